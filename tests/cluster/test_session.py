"""The clusters that commands start for themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

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
