"""Kill anything at any moment: a rerun finishes the job and gives the same rows, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hfbatch
from hfbatch import JobSpec
from hfbatch.predict.verify import verify_output
from tests.jobs.here import job_here
from tests.jobs.poison import slow_model
from tests.jobs.tools import (
    make_spec,
    part_names,
    part_stamps,
    processes_of,
    read_output,
    sentences,
    start_job,
    write_shards,
)

pytestmark = pytest.mark.timeout(500)


def slow_spec(folder: Path, model: str, out: str, workers: int = 1) -> JobSpec:
    """A job of 30 splits, each of which takes a third of a second with the slow model."""
    return make_spec(
        "embedding", str(folder / model), folder / "in", folder / out, input={"split_rows": 30}, batch={"size": 16},
        workers={"count": workers}, model={"trust_remote_code": True},
    )  # fmt: skip


def wait_for_parts(job: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(part_names(out)) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the input `in`, models of the same weights, and the output `whole` of a job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    write_shards(folder / "in", sentences(900, most=8), shards=10)
    slow_model(folder)
    assert job_here(slow_spec(folder, "fast", "whole")).exit_code == 0
    return folder


def test_two_commands_at_once_a_killed_worker_a_killed_driver_and_ctrl_c_lose_and_repeat_nothing(
    uninterrupted: Path, ray_cluster: str
) -> None:
    spec, out = slow_spec(uninterrupted, "slow", "killed"), uninterrupted / "killed"
    jobs = [start_job(spec, uninterrupted, ray_cluster) for _ in range(2)]
    deadline = time.monotonic() + 300
    while all(job.poll() is None for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
    ((told, loser),) = [(job.communicate()[0], job) for job in jobs if job.poll() is not None]
    assert loser.returncode == 1, told
    assert f"output {out} is being written by " in " ".join(told.split())
    assert "Traceback" not in told
    (job,) = [job for job in jobs if job is not loser]
    wait_for_parts(job, out, 3)
    (worker,) = processes_of(os.getpid(), "ForwardStage")
    worker.kill()
    wait_for_parts(job, out, len(part_names(out)) + 3)  # the job goes on with a new one
    job.kill()
    job.wait()
    while processes_of(os.getpid(), "ForwardStage"):  # the cluster ends what the dead driver had started
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kept = part_stamps(out)
    assert len(kept) < 25
    assert not (out / "_SUCCESS").exists()

    job = start_job(spec, uninterrupted, ray_cluster)
    wait_for_parts(job, out, len(kept) + 2)
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 130, printed
    assert "the same command resumes from" in " ".join(printed.split())
    assert "Traceback" not in printed
    stamps = part_stamps(out)
    assert kept.items() <= stamps.items()

    result = hfbatch.run(slow_spec(uninterrupted, "slow", "killed", workers=2), quiet=True)

    assert result.exit_code == 0, result.message
    assert stamps.items() <= part_stamps(out).items()
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []


NODE_LOSS = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.forked_workers import use_forked_workers
import ray, hfbatch

spec, out = hfbatch.JobSpec.load(sys.argv[1]), Path(sys.argv[2])
# A node that is gone is missed after three seconds, one that is slow to answer after thirty.
missed = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
use_forked_workers()
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": missed})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

def lose_a_node():
    while len(list(out.glob("part-*.parquet"))) < 4:
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    print("node lost with", len(list(out.glob("part-*.parquet"))), "parts")

threading.Thread(target=lose_a_node, daemon=True).start()
result = hfbatch.run(spec, quiet=True)
print(result.message)
ray.shutdown()
cluster.shutdown()
sys.exit(result.exit_code)
"""


def test_losing_a_node_of_two_changes_nothing(uninterrupted: Path, forked: None) -> None:
    spec, out = slow_spec(uninterrupted, "slow", "node", workers=2), uninterrupted / "node"
    spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"cpus": 0.75})})
    path = uninterrupted / "node.yaml"
    path.write_text(spec.to_yaml())
    command = [sys.executable, "-c", NODE_LOSS, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node lost" in done.stdout
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []
