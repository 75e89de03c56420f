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
from hfbatch.predict.verify import verify_output
from tests.jobs.here import job_here
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
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Path:
    """Folder with the input `in` and the output `whole` of a job that nobody disturbed, in one process."""
    folder = tmp_path_factory.mktemp("resume")
    assert job_here(slow_spec(folder, minilm, "whole")).exit_code == 0
    return folder


@pytest.mark.timeout(400)
def test_killed_workers_a_killed_driver_and_ctrl_c_lose_and_repeat_nothing(
    uninterrupted: Path, minilm: str, ray_cluster: str
) -> None:
    spec, out = slow_spec(uninterrupted, minilm, "killed"), uninterrupted / "killed"
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
    wait_for_parts(job, out, len(part_names(out)) + 3)  # the job goes on with new ones
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(3)  # the cluster ends what the dead driver had started
    kept = part_stamps(out)
    assert len(kept) < 25
    assert not (out / "_SUCCESS").exists()

    job = start_job(spec, uninterrupted, ray_cluster)
    wait_for_parts(job, out, len(kept) + 2)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 130, printed
    assert "the same command resumes from" in " ".join(printed.split())
    assert "Traceback" not in printed
    stamps = part_stamps(out)
    assert kept.items() <= stamps.items()

    code, printed = run_job(spec, uninterrupted, ray_cluster)

    assert code == 0, printed
    assert stamps.items() <= part_stamps(out).items()
    assert part_names(out) == part_names(uninterrupted / "whole")
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []


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
