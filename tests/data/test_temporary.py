"""Temporary folders are closed to others, and those of dead jobs are deleted; those of living ones never."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from hfbatch.data.temporary import own_folder, sweep

HOLD = """
import sys
from hfbatch.data.temporary import own_folder
with own_folder("train-", sys.argv[1]) as folder:
    (folder / "checkpoint").write_text("x")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def test_a_folder_of_a_dead_process_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    held = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    names = [one.stdout.readline().strip() for one in held if one.stdout]
    held[0].kill()
    held[0].wait(30)
    for other in (
        "hfbatch-new",
        "hfbatch-error",
        "somebody",
    ):  # one that is being made, and no folders of ours
        (tmp_path / other).mkdir()
    (tmp_path / "hfbatch-new" / "owner").touch()
    (tmp_path / "hfbatch-link").symlink_to(tmp_path / names[0])
    with own_folder(parent=str(tmp_path)) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert sweep(tmp_path) == []
        there = {path.name for path in tmp_path.iterdir()}
        assert there == {
            names[1],
            "hfbatch-new",
            "hfbatch-error",
            "somebody",
            "hfbatch-link",
            folder.name,
        }
    assert not folder.exists()
    held[1].communicate("", timeout=30)
    assert not (tmp_path / names[1]).exists()


def test_a_folder_of_another_user_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "hfbatch-other"
    folder.mkdir()
    (folder / "owner").write_text("1")
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        assert sweep(tmp_path) == []
    else:
        assert sweep(tmp_path) == ["hfbatch-other"]
    assert sweep(tmp_path / "nowhere") == []
