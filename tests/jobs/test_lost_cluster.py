"""Whatever of Ray dies or stops, a job ends with a sentence, its report and JSON, and never hangs."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import programs
from tests.jobs.tools import make_spec, part_names, processes_of, sentences, write_shards
from tests.programs import Program

pytestmark = pytest.mark.timeout(400)


def impatient() -> None:
    """The command, which waits three seconds for an answer of the tracker, and as long to leave a lost cluster."""
    from hfbatch.cluster import pipeline, session

    pipeline.TRACKER_TIMEOUT_S = session.LEAVE_S = 3
    programs.hfbatch()


def message_of_a_job_that_loses(
    process: str, number: signal.Signals, address: str, folder: Path, encoder: str
) -> str:
    """Runs a job and sends a signal to a process of its cluster. :returns: the message of the job, which has failed."""
    out = folder / "out"
    write_shards(folder / "in", sentences(3000))
    spec = make_spec("embedding", encoder, folder / "in", out, input={"split_rows": 2})
    (folder / "spec.yaml").write_text(spec.to_yaml())
    arguments = ["run", str(folder / "spec.yaml"), "--address", address, "--json"]
    job = Program(impatient, *arguments)
    deadline = time.monotonic() + 300
    while len(part_names(out)) < 3:
        assert job.poll() is None, job.output
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (found,) = processes_of(job.pid if address == "local" else os.getpid(), process)
    found.send_signal(number)
    code = job.wait(timeout=200)
    with suppress(psutil.NoSuchProcess):
        found.kill()
    assert code == 1, job.output
    report = json.loads(job.printed)
    assert "the same command" in job.printed
    return report["message"] if "message" in report else report["faults"][0]


def test_a_job_whose_cluster_loses_its_head_ends_with_words(
    tmp_path: Path, encoder: str, forked: None
) -> None:
    told = message_of_a_job_that_loses("gcs_server", signal.SIGKILL, "local", tmp_path, encoder)
    assert "its process gcs_server has died" in told


def test_a_job_whose_tracker_is_stopped_ends_with_words(
    tmp_path: Path, encoder: str, ray_cluster: str
) -> None:
    told = message_of_a_job_that_loses("TrackerState", signal.SIGSTOP, ray_cluster, tmp_path, encoder)
    assert "tracker, a process on this machine, has not answered" in told
