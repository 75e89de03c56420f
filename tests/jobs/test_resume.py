"""Kill anything at any moment: a rerun finishes the job and gives the same rows, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hfbatch import JobSpec
from hfbatch.verify import verify_output
from tests.jobs.tools import (
    make_spec,
    part_names,
    part_stamps,
    read_output,
    run_job,
    sentences,
    start_job,
    write_shards,
)


def slow_spec(tmp_path: Path, model: str, out: str) -> JobSpec:
    """A job of 30 splits that takes some seconds."""
    if not (tmp_path / "in").exists():
        write_shards(tmp_path / "in", sentences(900, most=8), shards=10)
    return make_spec(
        "embedding", model, tmp_path / "in", tmp_path / out, input={"split_rows": 30}, batch={"size": 16},
        workers={"count": 2},
    )  # fmt: skip


def wait_for_parts(job: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(part_names(out)) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, minilm: str, ray_cluster: str) -> Path:
    """Folder with the input `in` and the output `whole` of a job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    code, printed = run_job(slow_spec(folder, minilm, "whole"), folder, ray_cluster)
    assert code == 0, printed
    return folder


def test_killing_the_driver_twice_loses_and_repeats_nothing(
    uninterrupted: Path, minilm: str, ray_cluster: str
) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "killed"), uninterrupted / "killed"
    kept: dict[str, tuple[int, int]] = {}
    for more in (4, 6):
        job = start_job(spec, uninterrupted, ray_cluster)
        wait_for_parts(job, out, len(kept) + more)
        job.send_signal(signal.SIGKILL)
        job.wait()
        time.sleep(3)  # the cluster ends what the dead driver had started
        stamps = part_stamps(out)
        assert kept.items() <= stamps.items()
        kept = stamps
    assert not (out / "_SUCCESS").exists()
    assert len(kept) < 30

    code, printed = run_job(spec, uninterrupted, ray_cluster)

    assert code == 0, printed
    assert kept.items() <= part_stamps(out).items()
    assert part_names(out) == part_names(uninterrupted / "whole")
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []


def test_killing_a_local_cluster_with_its_driver(uninterrupted: Path, minilm: str) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "local"), uninterrupted / "local"
    job = start_job(spec, uninterrupted, "local")
    wait_for_parts(job, out, 3)
    job.send_signal(signal.SIGKILL)
    job.wait()

    code, printed = run_job(spec, uninterrupted, "local")

    assert code == 0, printed
    assert read_output(out).equals(read_output(uninterrupted / "whole"))


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(
    uninterrupted: Path, minilm: str, ray_cluster: str
) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "ctrl-c"), uninterrupted / "ctrl-c"
    job = start_job(spec, uninterrupted, ray_cluster)
    wait_for_parts(job, out, 3)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 130, printed
    assert "the same command goes on from here" in printed
    assert "Traceback" not in printed

    code, printed = run_job(spec, uninterrupted, ray_cluster)

    assert code == 0, printed
    assert read_output(out).equals(read_output(uninterrupted / "whole"))


def test_killing_a_worker_delays_the_job_and_changes_nothing(
    uninterrupted: Path, minilm: str, ray_cluster: str
) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "actor"), uninterrupted / "actor"
    job = start_job(spec, uninterrupted, ray_cluster)
    wait_for_parts(job, out, 3)
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ForwardStage" in " ".join(process.info["cmdline"] or [])
    ]
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed
    assert read_output(out).equals(read_output(uninterrupted / "whole"))


NODE_LOSS = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
import ray, hfbatch

spec, out = hfbatch.JobSpec.load(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
ray.init(address=cluster.address, log_to_driver=False)

def lose_a_node():
    while len(list(out.glob("part-*.parquet"))) < 4:
        time.sleep(0.05)
    cluster.remove_node(nodes[1], allow_graceful=False)
    print("node lost with", len(list(out.glob("part-*.parquet"))), "parts")

threading.Thread(target=lose_a_node, daemon=True).start()
result = hfbatch.run(spec, quiet=True)
print(result.message)
ray.shutdown()
cluster.shutdown()
sys.exit(result.exit_code)
"""


def test_losing_a_node_of_three_changes_nothing(uninterrupted: Path, minilm: str) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "node"), uninterrupted / "node"
    spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": 3, "cpus": 1.5})})
    path = uninterrupted / "node.yaml"
    path.write_text(spec.to_yaml())
    command = [sys.executable, "-c", NODE_LOSS, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node lost" in done.stdout
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []
