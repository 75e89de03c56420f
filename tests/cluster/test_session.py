"""The clusters that commands start for themselves."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
from pathlib import Path

import ray
from ray._private.utils import read_ray_address

from hfbatch.cluster.session import connect

with connect("local"):
    assert read_ray_address() != ray.get_runtime_context().gcs_address  # another cluster's, or None
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert session.parent.name.startswith("hfbatch-"), session
    assert session.exists()
assert not session.parent.exists()
"""


def test_the_cluster_of_a_command_is_not_found_by_the_next_and_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
