"""Private temporary folders that are removed after their job, even if the job is killed.

The process that creates a folder holds a lock on a file in it, which the kernel releases when the process ends. The
next job on the machine deletes the folders whose lock is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "hfbatch-"
OWNER = "owner"
"""The locked file in a folder, with the id of the process that created it."""


@contextmanager
def own_folder(kind: str = "", parent: str | None = None) -> Iterator[Path]:
    """Creates a folder of mode 0700 that is deleted after the block; first deletes folders of dead processes.

    :param kind: part of the folder's name.
    :param parent: parent folder; default: the system's folder for temporary files.
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
    """Deletes a folder of a dead process. A folder under construction has an empty file, or none, and is kept."""
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


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment while the block runs, for processes that start in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
