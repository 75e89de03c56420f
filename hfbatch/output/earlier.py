"""Moves the files of an output of the version before to the places where this version keeps them.

That version kept all but the rows in OUT/_hfbatch, let parts take any name of an input file, and wrote JSON to _SUCCESS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import pyarrow.fs as pafs

from hfbatch.data.filesystem import fsspec_of, is_local, list_names, list_versions
from hfbatch.data.splits import part_name
from hfbatch.output.layout import JOB, OLD_INNER, SUCCESS, after, before, is_part, is_temporary, lock_number
from hfbatch.output.writer import sync_folder


def has_earlier(fs: pafs.FileSystem, root: str) -> bool:
    """Returns whether an output holds files of the version before, or a lock of one of its runs."""
    return bool(list_names(fs, f"{root}/{OLD_INNER}"))


def move_earlier(fs: pafs.FileSystem, root: str, check: Callable[[], None]) -> None:
    """Moves the files of the version before; a call that was killed is completed by the next one.

    Until the last step, which moves job.json, the output is still one of the version before: every file that is in its
    old place was written there last, and replaces one in the new place. _SUCCESS comes first: the run that moves the
    files writes it again if all rows are there.

    :param check: raises if this process no longer holds the output; called before each change.
    :raises OSError: if a file cannot be moved.
    """
    files = [
        f"{OLD_INNER}/{info.path.rpartition(f'/{OLD_INNER}/')[2]}"
        for info in fs.get_file_info(pafs.FileSelector(f"{root}/{OLD_INNER}", True, True))
        if info.type == pafs.FileType.File and not lock_number(info.base_name)
    ]
    if before(JOB) in files:
        check()
        if list_versions(fs, root).get(SUCCESS, (0, 0))[0]:  # that of a training is empty, and stays
            fs.delete_file(f"{root}/{SUCCESS}")
        for name in list_names(fs, root):
            if is_part(name) and part_name(name) != name:
                _move(fs, f"{root}/{name}", f"{root}/{part_name(name)}", check)
    for name in sorted(files, key=lambda name: (name == before(JOB), name)):
        if is_temporary(name.rpartition("/")[2]):
            fs.delete_file(f"{root}/{name}")
        else:
            _move(fs, f"{root}/{name}", f"{root}/{after(name)}", check)
    for name, folder in list_names(fs, f"{root}/{OLD_INNER}").items():
        if folder:
            fs.delete_dir(f"{root}/{OLD_INNER}/{name}")


def _move(fs: pafs.FileSystem, source: str, target: str, check: Callable[[], None]) -> None:
    """Moves a file, replacing the target: a rename on a local disk, a copy and a deletion on an object store."""
    check()
    folder = os.path.dirname(target)
    if not is_local(fs):
        if (inner := fsspec_of(fs)) is not None:
            inner.makedirs(folder, exist_ok=True)
        fs.move(source, target)
        return
    os.makedirs(folder, exist_ok=True)
    with suppress(FileNotFoundError):
        os.replace(source, target)
    sync_folder(folder)
