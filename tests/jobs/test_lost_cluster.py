"""Whatever of Ray dies or stops, a job ends with a sentence, its report and JSON, and never hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.jobs.tools import make_spec, part_names, sentences, write_shards

COMMAND = """
import hfbatch.cluster.pipeline
from hfbatch.cli.app import app
hfbatch.cluster.pipeline.TRACKER_TIMEOUT_S = 3
app()
"""


@pytest.mark.parametrize(
    ("process", "number", "told"),
    [
        ("gcs_server", signal.SIGKILL, "its process gcs_server has died"),
        ("TrackerState", signal.SIGSTOP, "tracker, a process on this machine, has not answered"),
    ],
)
def test_a_job_whose_cluster_fails_ends_with_words(
    process: str, number: signal.Signals, told: str, tmp_path: Path, encoder: str
) -> None:
    out = tmp_path / "out"
    write_shards(tmp_path / "in", sentences(3000))
    spec = make_spec("embedding", encoder, tmp_path / "in", out, input={"split_rows": 2})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    arguments = ["run", str(tmp_path / "spec.yaml"), "--address", "local", "--json"]
    job = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while len(part_names(out)) < 3:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(job.pid).children(recursive=True)
    (found,) = (one for one in children if process in " ".join(one.cmdline()[:1]))
    os.kill(found.pid, number)
    printed, errors = job.communicate(timeout=200)
    assert job.returncode == 1, errors
    report = json.loads(printed)
    assert told in (report["message"] if "message" in report else report["faults"][0])
    assert "the same command" in printed
