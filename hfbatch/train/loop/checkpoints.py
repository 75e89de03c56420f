"""Atomic checkpoints in the output folder. Does not import torch or Ray.

    OUT/__hfbatch/checkpoints/step-00000120/…            files that the trainer saved
    OUT/__hfbatch/checkpoints/step-00000120/MANIFEST.json   size and digest of each file; written last

A folder without a manifest is not a checkpoint; one whose files differ from its manifest is skipped for the previous.
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
from hfbatch.output.writer import write_file

MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d+)")

Sums = dict[str, tuple[int, str]]
"""Size in bytes and digest of files by their path in the checkpoint."""


class Checkpoints:
    """The checkpoints of one training.

    :param folder: path or URL of the folder of all checkpoints.
    """

    def __init__(self, folder: str) -> None:
        self.fs, self.root = open_filesystem(folder)

    def path(self, step: int) -> str:
        """Returns the path of the checkpoint of a step on `fs`."""
        return f"{self.root}/step-{step:08d}"

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints, ascending, without validating their files."""
        found = (_STEP.fullmatch(name) for name, folder in list_names(self.fs, self.root).items() if folder)
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if kind_of(self.fs, f"{self.path(step)}/{MANIFEST}") == "file"]

    def upload(self, local: Path, step: int, names: list[str]) -> Sums:
        """Uploads files of a local folder; they become a checkpoint with `commit`.

        Invalidates an earlier checkpoint of that step, such as a damaged one.
        """
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.path(step)}/{MANIFEST}")
        for name in names:
            target = f"{self.path(step)}/{name}"
            self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            pafs.copy_files(str(local / name), target, pafs.LocalFileSystem(), self.fs)
        return {name: sum_of(local / name) for name in names}

    def commit(self, step: int, sums: Mapping[str, tuple[int, str]]) -> None:
        """Commits the uploaded files as the checkpoint of a step.

        :raises OSError: if one of them is incomplete; then there is no checkpoint of that step.
        """
        for name, (size, _) in sums.items():
            there = self.fs.get_file_info(f"{self.path(step)}/{name}").size
            if there != size:
                raise OSError(f"{name} has {there or 0:,} bytes in place of {size:,}")
        text = json.dumps({"step": step, "files": sums}, indent=1)
        write_file(self.fs, f"{self.path(step)}/{MANIFEST}", text.encode())

    def fetch(self, step: int, local: Path) -> Path | None:
        """Copies a checkpoint below a local folder; returns None if a file is missing or damaged."""
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
        """Copies the newest valid checkpoint below a local folder; returns its step and path, or None."""
        for step in reversed(self.steps()):
            found = self.fetch(step, local)
            if found is not None:
                return step, found
        return None

    def prune(self, newest: int, keep: int, best: int | None) -> None:
        """Deletes all checkpoints but the newest few and the best one.

        :param newest: the step of the checkpoint just committed. Those of later steps are damaged, else training would
            have resumed from them.
        :param best: the step of the best checkpoint.
        """
        steps = self.steps()
        kept = {best, *[step for step in steps if step <= newest][-keep:]}
        for step in steps:
            if step not in kept:
                self.fs.delete_file(
                    f"{self.path(step)}/{MANIFEST}"
                )  # first, so that no partly deleted checkpoint counts as one
                self.fs.delete_dir(self.path(step))


def sum_of(path: Path) -> tuple[int, str]:
    """Returns the size in bytes and the digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return path.stat().st_size, digest
