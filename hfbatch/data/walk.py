"""Lists every file below a folder once, whatever links and names lead to it."""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow.fs as pafs

from hfbatch.data.filesystem import SourceFile, fsspec_of, identity, is_local, lies_in, printable
from hfbatch.data.globs import Glob, State

INNER = "__hfbatch"
"""Folder in an output of hfbatch that holds all but its rows; marks a folder as an output."""
OLD_INNER = "_hfbatch"
"""The same folder, as the version before named it."""
OUTPUT = "outputs of hfbatch, which are read only where they are input.path themselves"
DANGLING = "links that lead nowhere"
ABOVE = "links to a folder that holds the input"
AGAIN = "links to what is read under another name"
HARD_LINK = "other names of a file that is read"
SPECIAL = "neither files nor folders"
NOT_UTF8 = "its name is not UTF-8; rename it"


@dataclass
class Listing:
    """The files below a folder."""

    files: list[SourceFile] = field(default_factory=list)
    """Sorted by path, without those at or below a name that begins with `.` or `_`, unless that is a partition."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Other paths, and why they are left out."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Paths of files that cannot be opened, and why."""


def list_files(fs: pafs.FileSystem, root: str, glob: Glob | None = None) -> Listing:
    """Lists the files below a folder that match a glob, each file once, and the paths left out.

    Outputs of hfbatch below the folder are left out. A file or folder that is also the target of links is read under
    its own name. A file with hard links is read under the first of its names, but once for each partition, since the
    values of partitions are part of its rows.

    :raises OSError: if a folder cannot be listed.
    """
    glob = glob or Glob()
    listing = _Walk(root, glob).run() if is_local(fs) else _list_store(fs, root, glob)
    listing.files.sort(key=lambda file: file.path)
    return listing


@dataclass(frozen=True)
class _Seen:
    """A file found by the walk."""

    path: str
    by_link: bool
    status: os.stat_result


class _Walk:
    """Walks through local folders: first files and folders, then the targets of links."""

    def __init__(self, root: str, glob: Glob) -> None:
        self._root, self._real, self._glob = root, os.path.realpath(root), glob
        self._entered: set[tuple[str, State]] = set()
        self._links: deque[tuple[str, State]] = deque()
        self._seen: list[_Seen] = []
        self._left_out: dict[str, str] = {}

    def run(self) -> Listing:
        """Returns the listing, not sorted."""
        self._enter("", self._real, self._glob.start, False)
        while self._links:
            self._follow(*self._links.popleft())
        seen = list(self._once())
        listing = Listing(left_out={printable(path): why for path, why in self._left_out.items()})
        for one in seen:
            path = printable(one.path)
            listing.files.append(SourceFile(path, one.status.st_size, one.status.st_mtime_ns))
            if path != one.path:
                listing.unreadable[path] = NOT_UTF8
        return listing

    def _enter(self, path: str, real: str, state: State, by_link: bool) -> None:
        folders = [(path, real, state)]
        while folders:
            path, real, state = folders.pop()
            where = os.path.join(self._root, path)
            with os.scandir(where) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            if path and any(entry.name in (INNER, OLD_INNER) and entry.is_dir() for entry in entries):
                self._left_out[path] = OUTPUT
                continue
            self._entered.add((real, state))
            for entry in entries:
                name, after = f"{path}/{entry.name}".lstrip("/"), self._glob.step(state, entry.name)
                if hidden(entry.name) or not after:
                    continue
                if entry.is_symlink():
                    self._links.append((name, after))
                elif entry.is_dir():
                    folders.append((name, os.path.join(real, entry.name), after))
                elif self._glob.accepts(after):
                    with suppress(FileNotFoundError):  # deleted since the folder was listed
                        self._add(name, entry.stat(), by_link)

    def _follow(self, path: str, state: State) -> None:
        where = os.path.join(self._root, path)
        try:
            status = os.stat(where)
        except OSError:
            self._left_out[path] = DANGLING
            return
        if not stat.S_ISDIR(status.st_mode):
            if self._glob.accepts(state):
                self._add(path, status, True)
            return
        real = os.path.realpath(where)
        if lies_in(self._real, real):
            self._left_out[path] = ABOVE
        elif (real, state) in self._entered:
            self._left_out[path] = AGAIN
        else:
            self._enter(path, real, state, True)

    def _add(self, path: str, status: os.stat_result, by_link: bool) -> None:
        if stat.S_ISREG(status.st_mode):
            self._seen.append(_Seen(path, by_link, status))
        else:
            self._left_out[path] = SPECIAL

    def _once(self) -> Iterator[_Seen]:
        """Yields each file under the first of its names; its own names come before those of links."""
        first: dict[tuple[int, int] | str, list[str]] = {}
        for one in sorted(self._seen, key=lambda one: (one.by_link, one.path)):
            # Some network filesystems have no inode numbers.
            same = (one.status.st_dev, one.status.st_ino) if one.status.st_ino else one.path
            names = first.setdefault(same, [])
            partitions = [_partition(name) for name in names]
            if names and (one.by_link or _partition(one.path) in partitions):
                self._left_out[one.path] = AGAIN if one.by_link else HARD_LINK
            else:
                names.append(one.path)
                yield one


def _list_store(fs: pafs.FileSystem, root: str, glob: Glob) -> Listing:
    """Lists a folder of an object store, which has no links."""
    found = list(_find(fs, root))
    inside = re.compile(f"/(?:{INNER}|{OLD_INNER})/")
    outputs = {
        match.string[: match.start()] for match in map(inside.search, (file.path for file in found)) if match
    }
    listing = Listing()
    for file in found:
        names = file.path.split("/")
        above = ("/".join(names[:count]) for count in range(1, len(names)))
        if any(map(hidden, names)) or not glob.accepts(glob.walk(file.path)):
            continue
        output = next((folder for folder in above if folder in outputs), None)
        if output is None:
            listing.files.append(file)
        else:
            listing.left_out[output] = OUTPUT
    return listing


def _find(fs: pafs.FileSystem, root: str) -> Iterator[SourceFile]:
    inner = fsspec_of(fs)
    if inner is not None:
        for path, info in inner.find(root, detail=True).items():
            if info["type"] == "file":
                yield SourceFile(_below(root, path), int(info["size"] or 0), identity(info))
        return
    for info in fs.get_file_info(pafs.FileSelector(root, recursive=True)):
        if info.type == pafs.FileType.File:
            yield SourceFile(_below(root, info.path), info.size, info.mtime_ns or 0)


def hidden(name: str) -> bool:
    """Returns whether a name is hidden by convention; names such as `_year=2020` are partitions."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _partition(path: str) -> list[str]:
    """Returns the folders that are values of partition columns."""
    return [folder for folder in path.split("/")[:-1] if "=" in folder]


def _below(root: str, path: str) -> str:
    return path[len(root) :].lstrip("/") if path.startswith(root) else path.lstrip("/")
