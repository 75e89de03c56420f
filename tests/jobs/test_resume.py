"""Kill anything at any moment: a rerun finishes the job and gives the same rows, bit for bit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import hfbatch
from hfbatch import JobSpec
from hfbatch.predict.run import JobResult
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
from tests.programs import Program, run_and_lose_a_node

pytestmark = pytest.mark.timeout(500)


def slow_spec(folder: Path, model: str, out: str, workers: int = 1) -> JobSpec:
    """A job of 30 splits, each of which takes a third of a second with the slow model."""
    return make_spec(
        "embedding", str(folder / model), folder / "in", folder / out, input={"split_rows": 30}, batch={"size": 16},
        workers={"count": workers}, model={"trust_remote_code": True},
    )  # fmt: skip


def wait_for_parts(job: Program, out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(part_names(out)) < count:
        assert job.poll() is None, job.output
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
    (loser,) = [job for job in jobs if job.poll() is not None]
    assert loser.poll() == 1, loser.output
    assert f"output {out} is being written by " in " ".join(loser.output.split())
    assert "Traceback" not in loser.output
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
    job.interrupt()
    assert job.wait(timeout=120) == 130, job.output
    assert "the same command resumes from" in " ".join(job.output.split())
    assert "Traceback" not in job.output
    stamps = part_stamps(out)
    assert kept.items() <= stamps.items()

    result = hfbatch.run(slow_spec(uninterrupted, "slow", "killed", workers=2), quiet=True)

    assert result.exit_code == 0, result.message
    assert stamps.items() <= part_stamps(out).items()
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []


def lose_a_node() -> None:
    """Runs the job that the program's argument names, and loses a node after four parts."""
    spec = JobSpec.load(sys.argv[1])
    done: list[JobResult] = []
    run_and_lose_a_node(
        lambda: done.append(hfbatch.run(spec, quiet=True)),
        lambda: len(part_names(spec.output.path)) >= 4,
    )
    print(done[0].message)
    sys.exit(done[0].exit_code)


def test_losing_a_node_of_two_changes_nothing(uninterrupted: Path, forked: None) -> None:
    spec, out = slow_spec(uninterrupted, "slow", "node", workers=2), uninterrupted / "node"
    spec = spec.model_copy(update={"workers": spec.workers.model_copy(update={"cpus": 0.75})})
    path = uninterrupted / "node.yaml"
    path.write_text(spec.to_yaml())
    done = Program(lose_a_node, str(path))
    assert done.wait(timeout=380) == 0, done.output
    assert "node lost" in done.output
    assert read_output(out).equals(read_output(uninterrupted / "whole"))
    assert verify_output(str(out)) == []
