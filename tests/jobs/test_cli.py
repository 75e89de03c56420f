"""Commands as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from hfbatch.tasks import TASKS
from tests.jobs.tools import call, read_output, sentences, write_shards

pytestmark = pytest.mark.timeout(400)

OFFLINE = """
import shutil
import sys
from pathlib import Path

from tests.jobs.tools import call

encoder, home, *asked = sys.argv[1:]
cached = Path(home) / "hub" / "models--org--tiny"
done = call(*asked)
assert done.exit_code == 2, done.stderr
assert "the Hub cannot be reached" in done.stderr
assert "Traceback" not in done.stderr
(cached / "refs").mkdir(parents=True)
(cached / "refs" / "main").write_text("0" * 40)
shutil.copytree(encoder, cached / "snapshots" / ("0" * 40))
done = call(*asked)
assert done.exit_code == 0, done.stderr
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, encoder: str, ray_cluster: str) -> dict[str, Any]:
    """An embedding job that was run as a command."""
    folder = tmp_path_factory.mktemp("cli")
    write_shards(folder / "in", sentences(40))
    source, out = str(folder / "in"), str(folder / "out")
    flags = ["-m", encoder, "--keep", "id", "--set", "model.dtype=float32", "--address", ray_cluster]
    done = call("embed", source, out, *flags, "--save", str(folder / "spec.yaml"), "--json")
    return {"folder": folder, "out": out, "source": source, "done": done, "flags": flags}


def test_embed_prints_its_report_as_json_and_progress_as_plain_lines(job: dict[str, Any]) -> None:
    done = job["done"]
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rows"]["out"] == 40
    assert report["seconds"]["first_part"] > 0
    assert "40/40 rows" in done.stderr
    assert read_output(job["out"]).column_names == ["id", "embedding"]


def test_the_saved_spec_means_the_same_job(job: dict[str, Any], ray_cluster: str) -> None:
    spec = job["folder"] / "spec.yaml"
    assert yaml.safe_load(spec.read_text())["output"] == {"path": job["out"], "keep": ["id"]}
    again = call("run", str(spec), "--address", ray_cluster)
    assert again.exit_code == 0, again.stderr
    assert "Nothing was left to do: 40 rows" in again.stdout


def test_dry_run_starts_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("embed", job["source"], str(out), *job["flags"], "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["input"]["rows"], plan["splits"]["todo"]) == (40, 1)
    assert plan["output"]["schema"]["embedding"].startswith("fixed_size_list")
    assert plan["lengths"]["padding"] < 0.5
    assert not out.exists()


def test_columns_to_keep_are_repeated_or_separated_by_commas(job: dict[str, Any], tmp_path: Path) -> None:
    for flags in (["--keep", "text"], ["--keep", "text,id"]):
        done = call("embed", job["source"], str(tmp_path), *job["flags"], *flags, "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        assert list(json.loads(done.stdout)["output"]["schema"]) == ["id", "text", "embedding"]


def test_plan_estimates_rate_and_time(job: dict[str, Any], tmp_path: Path) -> None:
    done = call("plan", "embedding", job["source"], str(tmp_path / "out"), *job["flags"], "--json")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trial"]["rows_per_s"] > 0
    assert plan["trial"]["eta_s"] > 0
    assert plan["layout"]["workers"] >= 1
    assert plan["model"]["parameters"] > 1000
    shown = call("plan", "embedding", job["source"], str(tmp_path / "out"), *job["flags"], "--no-trial")
    assert "1 to do" in shown.stdout


def test_status_verify_and_report_speak_of_the_output(job: dict[str, Any]) -> None:
    status = json.loads(call("status", job["out"], "--json").stdout)
    assert status["success"]
    assert (status["rows_out"], status["parts"]) == (40, 1)
    assert "success" in call("status", job["out"]).stdout
    assert call("verify", job["out"]).exit_code == 0
    report = call("report", job["out"])
    assert "report.html" in report.stdout
    assert call("status", "/nowhere").exit_code == 2


def test_faults_end_with_code_2_and_all_of_them_reported(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call("embed", job["source"], str(tmp_path), "-m", "/no/model", "--column", "text=body", "--json")
    assert done.exit_code == 2
    assert any("/no/model" in fault for fault in json.loads(done.stdout)["faults"])
    assert "Traceback" not in done.stderr
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    absent = call("embed", job["source"], str(tmp_path), *job["flags"][:-1], "127.0.0.1:1")
    assert absent.exit_code == 2
    assert "no Ray cluster answers" in absent.stderr


def test_a_hub_out_of_reach_is_reported_and_a_model_in_the_cache_does(tmp_path: Path, encoder: str) -> None:
    """In a process of its own, which reads where the Hub and its cache are when it starts."""
    home = str(tmp_path / "hf")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
    source = write_shards(tmp_path / "in", sentences(4))
    asked = ["embed", str(source), str(tmp_path / "out"), "-m", "org/tiny", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, encoder, home, *asked],
        capture_output=True, text=True, env={**os.environ, **nowhere},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_flags_without_a_value_and_an_output_inside_the_input_are_reported(job: dict[str, Any]) -> None:
    done = call(
        "embed", job["source"], job["out"], "-m", job["flags"][1], "--column", "body", "--param", "pooling"
    )
    assert done.exit_code == 2
    assert "write --column text=body" in done.stderr
    assert "write --param pooling=VALUE" in done.stderr
    inside = call("embed", job["source"], f"{job['source']}/out", "-m", job["flags"][1], "--dry-run")
    assert inside.exit_code == 2
    assert "lies in the input's folder" in inside.stderr


def test_too_many_workers_are_refused_before_work(job: dict[str, Any], tmp_path: Path) -> None:
    done = call("embed", job["source"], str(tmp_path / "out"), *job["flags"], "--set", "workers.cpus=64")
    assert done.exit_code == 2
    assert "do not fit into the cluster" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tasks_and_doctor_speak_to_people_and_machines() -> None:
    names = [task["name"] for task in json.loads(call("tasks", "--json").stdout)]
    assert names == list(TASKS)
    assert "embedding" in call("tasks", "embedding").stdout
    assert json.loads(call("tasks", "sentiment-analysis", "--json").stdout)["name"] == "text-classification"
    checks = json.loads(call("doctor", "--json").stdout)
    assert {"name", "status", "detail", "fix"} <= set(checks[0])


def test_secrets_stay_out_of_the_output(job: dict[str, Any]) -> None:
    for file in (Path(job["out"]) / "__hfbatch").rglob("*"):
        if file.is_file():
            assert b"hf_verysecret" not in file.read_bytes()


def test_ray_job_submit_runs_a_shipped_spec(tmp_path: Path, encoder: str, forked: None) -> None:
    """A real head node with its job server, as on a cluster."""
    write_shards(tmp_path / "in", sentences(20))
    overrides = [
        f"model.name={encoder}", "model.dtype=float32", f"input.path={tmp_path}/in", "input.columns={text: text}",
        f"output.path={tmp_path}/out", "output.keep=[id]", "workers.count=auto", "workers.gpus=0", "batch.size=8",
    ]  # fmt: skip
    folder = Path(sys.executable).parent
    port, dashboard, agent = free_port(), free_port(), free_port()
    temp = tempfile.mkdtemp(prefix="r")  # short: Ray keeps Unix sockets in it
    env = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "RAY_ADDRESS": "", "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    start = [
        sys.executable, "-m", "tests.head_node", "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}",
        "--num-cpus=2", f"--temp-dir={temp}", f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true",
        "--disable-usage-stats", "--block",
    ]  # fmt: skip
    head = subprocess.Popen(
        start, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        # The server of jobs passes them to the agent, for which it waits ten seconds.
        wait_for_answer(f"http://127.0.0.1:{dashboard}/api/version", head)
        wait_for_answer(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", head)
        sets = [word for override in overrides for word in ("--set", override)]
        submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--"]
        command = [*submit, "hfbatch", "run", str(Path("jobs/embed.yaml").resolve()), *sets]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Done: 20 rows" in done.stdout
        assert len(read_output(tmp_path / "out")) == 20
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)
        shutil.rmtree(temp, ignore_errors=True)


def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    command = f"{sys.executable} -m hfbatch tasks --json | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head node has ended"
        with suppress(requests.ConnectionError):
            if requests.get(url, timeout=30).ok:
                return
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
