"""Temporary folders that only this user can enter, and that do not outlive their job by much.

Whoever makes one keeps a lock on a file in it, which the kernel frees when the process dies, however it dies. The next
job on the machine deletes the folders whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "hfbatch-"
OWNER = "owner"
"""The locked file in a folder: the id of the process that made it."""


@contextmanager
def own_folder(kind: str = "", parent: str | None = None) -> Iterator[Path]:
    """A new folder of mode 0700, deleted at the end of the block; deletes those of dead processes first.

    :param kind: goes into the folder's name.
    :param parent: where to; default: the system's folder for temporary files.
    """
    within = Path(parent or tempfile.gettempdir())
    sweep(within)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX + kind, dir=within))
    with (folder / OWNER).open("w", encoding="ascii") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(str(os.getpid()))
        owner.flush()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> list[str]:
    """Deletes this user's folders of dead processes; returns their names."""
    with suppress(OSError):
        return [path.name for path in parent.glob(f"{PREFIX}*") if _swept(path)]
    return []


def _swept(folder: Path) -> bool:
    """Deletes a folder whose maker is dead. One that is being made has an empty file, or none, and is left alone."""
    try:
        facts = folder.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            return False
        handle = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(handle) as owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if not owner.read():
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True
