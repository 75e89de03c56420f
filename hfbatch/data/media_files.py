"""Reads the files that rows name, with checks: a row is data, and must not give access to what its author cannot read.

Bytes and regular files below the input's folder are always allowed: by their real path, or in the same bucket and
prefix. The spec's `input.files` can allow more.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow.fs as pafs

from hfbatch.data.download import WEB, FileRefusedError, Permit, download, shown, too_large
from hfbatch.data.filesystem import absolute, is_url, join, lies_in, open_filesystem, split_options
from hfbatch.spec.job import FilesSpec, InputSpec
from hfbatch.spec.location import Location

REMEMBERED_BYTES = 256 << 20
"""Bytes of remote files that a process caches: a split with one bad row reads the files of its other rows again."""
REMEMBERED_S = 600
_CHAIN = re.compile(r"[\w+.\-]+::.*://")
"""Chained filesystems of fsspec, such as simplecache::https://host/a.png."""


@dataclass(frozen=True)
class RowFiles:
    """The files that rows of an input may name; none without a folder and rules."""

    root: str = ""
    """Folder or URL of relative paths in the rows; all files below it may be read."""
    rules: FilesSpec = field(default_factory=FilesSpec)
    section: str = "input"
    """The section of the spec with the rules, for errors."""

    @property
    def spec(self) -> str:
        """Full name of the rules in the spec."""
        return f"{self.section}.files"

    def read(self, value: Any) -> bytes:
        """Reads a file.

        :param value: bytes; a path, URL or `data:` URL; or a dict with `bytes` or else `path`.
        :raises ValueError: if there are neither bytes nor a path.
        :raises FileRefusedError: for a file that rows may not name, that is not a regular file, or is too large.
        :raises OSError: if the file cannot be read.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not value:
            raise ValueError("there are neither bytes nor a path")
        if value[:5].lower() == "data:":
            return _inline(value)
        place = self.place_of(value)
        if not is_url(place):
            return self._read_local(place)
        return _RECENT.get((self, place), lambda: self._read_elsewhere(place))

    def refusal(self, name: str) -> str | None:
        """Returns why a file may not be read, by its name; None if it may. Opens nothing."""
        if name[:5].lower() == "data:":
            return None
        try:
            self.place_of(name)
        except FileRefusedError as error:
            return str(error)
        except (OSError, ValueError):  # reading the file will report it
            return None
        return None

    def place_of(self, name: str) -> str:
        """Resolves a name in a row to an absolute path or URL. :raises FileRefusedError: if it may not be read."""
        place = absolute(f"file://{name[7:]}") if name[:7].lower() == "file://" else name
        scheme = _scheme(place)
        if _CHAIN.match(place):
            raise FileRefusedError(f"{shown(name)} is a chain of filesystems, which rows may not name")
        if not is_url(place):
            return self._place_below(place)
        if scheme in WEB:
            self._permit(place)
        elif self._root_of(place) is None and (scheme not in self.rules.schemes or "::" in place):
            bucket = f"{scheme}://{urlsplit(place).netloc.rpartition('@')[2]}"
            raise FileRefusedError(
                f"{shown(name)} is not below {self._folder}; to allow it, add it to {self.spec}.roots: [{bucket}] or "
                f"{self.spec}.schemes: [{scheme}]"
            )
        elif split_options(place)[1] and self._root_of(place) is None:
            raise FileRefusedError(
                f"{shown(name)} has options behind a question mark, which would lead to another server; rows may not "
                "name these"
            )
        return place

    @property
    def _folder(self) -> str:
        return f"the folder of {self.section}.path"

    def _place_below(self, name: str) -> str:
        """Resolves a name without a scheme to a local file or a file in the input's bucket."""
        if not is_url(self.root) or name.startswith("/"):
            path = os.path.join(self.root, name)
            self._check_local(path, os.path.realpath(path))
            return path
        if ".." in name.split("/"):
            raise FileRefusedError(f"{shown(name)} leaves {self._folder}; write its whole URL")
        if _scheme(self.root) in WEB:
            return join(self.root, quote(name))
        return join(_bare(self.root, True), name)

    def _check_local(self, name: str, real: str) -> None:
        roots = [root for root in (self.root, *self.rules.roots) if root and not is_url(root)]
        if not any(lies_in(real, os.path.realpath(root)) for root in roots):
            leads = "" if os.path.normpath(name) == real else f", which is {shown(real)},"
            raise FileRefusedError(
                f"{shown(name)}{leads} is not below {self._folder}; to allow it, add its folder to {self.spec}.roots: "
                f"[{shown(os.path.dirname(real))}]"
            )

    def _read_local(self, path: str) -> bytes:
        # An O_PATH handle, so that the checked file is the one that is read, and nothing else is opened: opening a FIFO
        # waits for a writer, and opening a device may have side effects.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            itself = f"/proc/self/fd/{handle}"
            self._check_local(path, os.readlink(itself))
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise FileRefusedError(f"{shown(path)} is not a regular file")
            if found.st_size > self.rules.max_bytes:
                raise too_large(shown(path), self.rules.max_bytes, self.spec)
            with open(itself, "rb") as file:
                return file.read(found.st_size)
        finally:
            os.close(handle)

    def _root_of(self, url: str) -> str | None:
        """Returns the root in a bucket or on the web that contains a URL."""
        if ".." in url.split("/"):
            return None
        roots = [root for root in (self.root, *self.rules.roots) if is_url(root)]
        return next((root for root in roots if lies_in(_bare(url), _bare(root, True))), None)

    def _permit(self, url: str) -> Permit:
        """Returns the permit to download a web URL. :raises FileRefusedError: if it may not be downloaded."""
        from yarl import URL

        parsed, root = URL(url), self._root_of(url)
        schemes = tuple(scheme for scheme in self.rules.schemes if scheme in WEB)
        hosts = self.rules.hosts
        if root is not None and (hosts or not schemes):
            hosts += (urlsplit(root).netloc.rpartition("@")[2].lower(),)
        if not hosts and not schemes:
            raise FileRefusedError(
                f"{shown(url)} is on the network; to allow it, add its host to {self.spec}.hosts: [{parsed.raw_host}]"
            )
        permit = Permit(hosts, schemes or WEB, self.rules.max_bytes, self.rules.timeout, self.spec)
        permit.check_url(parsed)
        return permit

    def _read_elsewhere(self, url: str) -> bytes:
        if _scheme(url) in WEB:
            return download(url, self._permit(url))
        root = self._root_of(url)
        if root is None:
            fs, path = open_filesystem(url)
        else:  # with the root's credentials and options, and the literal key
            fs, folder = _filesystem(Location(root).unmasked)
            path = f"{folder}/{_bare(url)[len(_bare(root, True)) + 1 :]}"
        with fs.open_input_file(path) as file:
            size = file.size()
            if size > self.rules.max_bytes:
                raise too_large(shown(url), self.rules.max_bytes, self.spec)
            return file.read(size)


def with_absolute_paths(given: InputSpec) -> InputSpec:
    """Makes the paths of an input absolute."""
    files = given.files.model_copy(update={"roots": tuple(map(absolute, given.files.roots))})
    return given.model_copy(update={"path": absolute(given.path), "files": files})


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    return open_filesystem(root)


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _bare(url: str, is_root: bool = False) -> str:
    """Removes `user:secret@` and a trailing slash from a URL; from a root's URL also the store's options."""
    full = Location(url).unmasked
    if _scheme(url) in WEB:  # as in a request, where %2e%2e means the parent folder
        from yarl import URL

        full = str(URL(full))
    rest = (split_options(full)[0] if is_root else full).partition("://")[2]
    host, slash, path = rest.partition("/")
    user, _, address = host.rpartition("@")
    if _scheme(url) not in {"s3", *WEB} and ":" not in user:  # abfs://container@account
        address = host
    return f"{_scheme(url)}://{address}{slash}{path}".rstrip("/")


def _inline(url: str) -> bytes:
    """Decodes a `data:` URL."""
    head, _, body = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise ValueError("a data: URL without base64; write data:image/png;base64,...")
    return base64.b64decode(body, validate=True)


class _Recent:
    """Caches remote files, and the errors of those that could not be read.

    A split with a bad row is tried again in halves, which reads the files of all its rows again.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[float, bytes | Exception]] = OrderedDict()
        self._bytes, self._lock = 0, Lock()

    def get(self, key: Any, load: Callable[[], bytes]) -> bytes:
        """Returns, or raises, the result of the first call of `load` for a key."""
        with self._lock:
            kept = self._kept.get(key)
        if kept is None or time.monotonic() - kept[0] > REMEMBERED_S:
            found: bytes | Exception
            try:
                found = load()
            except (OSError, ValueError) as error:
                found = error
            kept = time.monotonic(), found
            self._keep(key, kept)
        if isinstance(kept[1], Exception):
            raise kept[1].with_traceback(None)
        return kept[1]

    def _keep(self, key: Any, kept: tuple[float, bytes | Exception]) -> None:
        with self._lock:
            self._bytes += _size(kept) - _size(self._kept.pop(key, None))
            self._kept[key] = kept
            while self._bytes > REMEMBERED_BYTES:
                self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(kept: tuple[float, bytes | Exception] | None) -> int:
    """Returns the bytes of an entry; a small number for an error."""
    return len(kept[1]) if kept and isinstance(kept[1], bytes) else 4096 if kept else 0


_RECENT = _Recent()
