"""The clusters that commands start for themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hfbatch.cluster import session
from hfbatch.cluster.sockets import BELOW, MOST_BYTES, check_sockets
from hfbatch.errors import SpecError

ALONE = """
from pathlib import Path

import ray
from ray._private.utils import read_ray_address

from hfbatch.cluster.session import connect

known = read_ray_address()
with connect("local"):
    assert read_ray_address() == known, read_ray_address()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert session.parent.name.startswith("hfbatch-"), session
    assert session.exists()
assert not session.parent.exists()
"""


def test_the_cluster_of_a_command_is_not_found_by_the_next_and_leaves_nothing() -> None:
    # In a folder of its own: clusters of other tests begin and end meanwhile. Names of sockets have to be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        env = {**os.environ, "RAY_TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=400, env=env
        )
    assert done.returncode == 0, done.stderr


def test_a_folder_whose_sockets_have_too_long_paths_is_told_before_ray_starts() -> None:
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
    monkeypatch.setattr(session, "_find_cluster", lambda address: "127.0.0.1:6379")
    with session.connect():
        assert [options["address"] for options in started] == ["127.0.0.1:6379"]
