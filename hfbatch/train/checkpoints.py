"""Checkpoints in the output folder: whole or not at all, the newest valid one found again. Knows nothing of training.

    OUT/_hfbatch/checkpoints/step-00000120/…            what the trainer saved
    OUT/_hfbatch/checkpoints/step-00000120/MANIFEST.json   size and digest of each file; written last

A folder without a manifest is none; one whose files differ from it is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow.fs as pafs

from hfbatch.data.filesystem import READ_ERRORS, kind_of, list_names, open_filesystem
from hfbatch.data.writer import write_file

MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d+)")

Sums = dict[str, tuple[int, str]]
"""Size in bytes and digest of files, by their path in the checkpoint."""


class Checkpoints:
    """The checkpoints of one training.

    :param folder: path or URL of the folder that holds them.
    """

    def __init__(self, folder: str) -> None:
        self.fs, self.root = open_filesystem(folder)

    def path(self, step: int) -> str:
        """Where the checkpoint of a step lies, on `fs`."""
        return f"{self.root}/step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; whether they are valid is not looked at."""
        found = (_STEP.fullmatch(name) for name, folder in list_names(self.fs, self.root).items() if folder)
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if kind_of(self.fs, f"{self.path(step)}/{MANIFEST}") == "file"]

    def upload(self, local: Path, step: int, names: list[str]) -> Sums:
        """Copies files of a local folder; they count once `commit` names them.

        What was there of that step before, such as one that is damaged, counts no longer.
        """
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path(step)}/{MANIFEST}")
        for name in names:
            target = f"{self.path(step)}/{name}"
            self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            pafs.copy_files(str(local / name), target, pafs.LocalFileSystem(), self.fs)
        return {name: sum_of(local / name) for name in names}

    def commit(self, step: int, sums: Mapping[str, tuple[int, str]]) -> None:
        """Makes the files that were uploaded the checkpoint of a step.

        :raises OSError: if one of them is not there in full; there is no checkpoint of that step then.
        """
        for name, (size, _) in sums.items():
            there = self.fs.get_file_info(f"{self.path(step)}/{name}").size
            if there != size:
                raise OSError(f"{name} has {there or 0:,} bytes in place of {size:,}")
        text = json.dumps({"step": step, "files": sums}, indent=1)
        write_file(self.fs, f"{self.path(step)}/{MANIFEST}", text.encode())

    def fetch(self, step: int, local: Path) -> Path | None:
        """A copy of a checkpoint below a local folder; None if a file is missing or not as it was written."""
        target = local / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        try:
            with self.fs.open_input_stream(f"{self.path(step)}/{MANIFEST}") as stream:
                files = json.loads(stream.read())["files"]
            pafs.copy_files(self.path(step), str(target), self.fs, pafs.LocalFileSystem())
            valid = all(sum_of(target / name) == tuple(found) for name, found in files.items())
        except (*READ_ERRORS, KeyError):
            return None
        return target if valid else None

    def newest(self, local: Path) -> tuple[int, Path] | None:
        """The newest checkpoint that is whole, copied below a local folder, and its step; None if there is none."""
        for step in reversed(self.steps()):
            found = self.fetch(step, local)
            if found is not None:
                return step, found
        return None

    def prune(self, newest: int, keep: int, best: int | None) -> None:
        """Deletes all but the newest few and the best one.

        :param newest: the step of the one just committed. Those of later steps are damaged: training would else
            have gone on from them.
        :param best: the step of the best one.
        """
        steps = self.steps()
        kept = {best, *[step for step in steps if step <= newest][-keep:]}
        for step in steps:
            if step not in kept:
                self.fs.delete_file(
                    f"{self.path(step)}/{MANIFEST}"
                )  # first: what is left of it is no checkpoint
                self.fs.delete_dir(self.path(step))


def sum_of(path: Path) -> tuple[int, str]:
    """Size in bytes and digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return path.stat().st_size, digest
