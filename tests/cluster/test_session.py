"""The clusters that commands start for themselves, and those of others that they join."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from hfbatch.cluster import session
from hfbatch.cluster.sockets import BELOW, MOST_BYTES, check_sockets
from hfbatch.cluster.watch import Watch
from hfbatch.errors import SpecError
from tests.jobs.tools import HFBATCH

ALONE = """
import os
import signal
import stat
from pathlib import Path

import psutil
import ray
from ray._private.utils import read_ray_address

from hfbatch.cluster.session import connect, start_ahead
from hfbatch.errors import WorkerError

known = read_ray_address()
before = signal.getsignal(signal.SIGTERM)
try:
    with connect("local", start_ahead("local")):
        assert read_ray_address() == known, read_ray_address()
        assert signal.getsignal(signal.SIGTERM) == before
        node = ray._private.worker._global_node
        session = Path(node.get_session_dir_path())
        assert session.parent.name.startswith("hfbatch-"), session
        assert session.exists()
        for folder in (session.parent, session.parent.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
        ray.get(ray.remote(lambda: 1).remote())
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            for one in process.net_connections("inet"):
                assert one.status != "LISTEN" or one.laddr.ip.endswith("127.0.0.1"), (process, one)
        (gcs,) = node.all_processes["gcs_server"]
        os.kill(gcs.process.pid, signal.SIGKILL)
        signal.pause()
except WorkerError as error:
    print(error, flush=True)
assert not session.parent.parent.exists()
print("nothing of it is left", flush=True)
"""


@pytest.mark.timeout(300)
def test_the_cluster_of_a_command_is_its_own_alone_and_its_loss_is_reported() -> None:
    # In a folder of its own: clusters of other tests begin and end meanwhile. Names of sockets have to be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        env = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=280, env=env
        )
    # The exit code is that of commands alone: on a busy machine Ray may wait for the lost cluster once more at exit, and
    # ends the process with a code of its own.
    told = "the Ray cluster of this job is gone: its process gcs_server has died\nnothing of it is left\n"
    assert done.stdout == told, done.stderr


def test_a_cluster_that_started_while_the_plan_found_faults_ends_without_a_trace(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        job = (
            "embed",
            str(tmp_path / "none"),
            str(tmp_path / "out"),
            "-m",
            "/no/model",
            "--address",
            "local",
        )
        done = subprocess.run(
            [*HFBATCH, *job],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "RAY_TMPDIR": folder},
        )
        running = [
            process.info for process in psutil.process_iter(["cmdline"]) if folder in str(process.info)
        ]
        assert (os.listdir(folder), running) == ([], [])
    assert done.returncode == 2
    assert "/no/model" in done.stderr


def named_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which Ray's folder for temporary files names a cluster."""
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_answers", lambda address: True)
    file = folder / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    file.write_text("192.0.2.7:6379")
    return file


def test_a_cluster_of_this_user_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named_cluster(tmp_path, monkeypatch)
    assert session.find_cluster(None) == session.find_cluster("auto") == "192.0.2.7:6379"


@pytest.mark.parametrize("way", ["file", "folder", "link", "linked folder"])
def test_a_cluster_that_somebody_else_may_have_named_is_not_joined(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = named_cluster(tmp_path, monkeypatch)
    match way:
        case "link":
            file.rename(tmp_path / "other")
            file.symlink_to(tmp_path / "other")
        case "linked folder":
            file.parent.rename(tmp_path / "other")
            (tmp_path / "ray").symlink_to(tmp_path / "other")
        case _ if os.getuid():
            pytest.skip("only root can give a file away")
        case _:
            os.chown(file if way == "file" else file.parent, 12345, 12345)
    assert session.find_cluster(None) is None
    assert "it is not used" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SpecError, match="give the cluster's address"):
        session.find_cluster("auto")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.8:6379")  # asked for
    assert session.find_cluster(None) == "192.0.2.8:6379"


def test_a_folder_whose_sockets_have_too_long_paths_is_reported_before_ray_starts() -> None:
    """Ray itself waits, and then has a traceback; the longest that passes is exactly as long as sockets allow."""
    check_sockets("/" + "x" * (MOST_BYTES - BELOW - 1))
    for name in ("x" * (MOST_BYTES - BELOW), "é" * ((MOST_BYTES - BELOW) // 2 + 1)):
        with pytest.raises(SpecError, match=rf"/{name} \(\d+ bytes\).* at most \d+ bytes, such as /tmp"):
            check_sockets(f"/{name}")


def test_a_long_temporary_folder_is_no_matter_where_a_cluster_runs_already(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    started: list[dict[str, object]] = []
    monkeypatch.setattr(session.ray, "init", lambda **options: started.append(options))
    with (
        pytest.raises(SpecError, match=r"RAY_TMPDIR: .*set RAY_TMPDIR to a folder"),
        session.connect("local"),
    ):
        pass
    assert not started
    monkeypatch.setattr(session, "find_cluster", lambda address: "127.0.0.1:6379")
    with session.connect():
        assert [options["address"] for options in started] == ["127.0.0.1:6379"]


def test_no_garbage_is_collected_while_ray_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's core ends the process if an object of Ray is released after it."""
    collecting = []
    monkeypatch.setattr(session.ray, "shutdown", lambda: collecting.append(gc.isenabled()))
    session._leave(None, Watch(None))
    assert collecting == [False]
    assert gc.isenabled()
