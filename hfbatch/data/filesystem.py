"""Paths and URLs to filesystems, and what lies on them. Knows nothing of rows and formats."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.errors import SpecError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*://")
_SECRET_KEY = re.compile(
    r"([?&][^=&]*(?:secret|token|password|passwd|key|credential|sig)[^=&]*=)[^&]*", re.IGNORECASE
)
_IDENTITY_KEYS = (
    "blob_id",
    "ETag",
    "etag",
    "checksum",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as a listing shows it."""

    path: str
    """Relative to the folder that was listed."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Modification time; else a number that changes with the etag; 0 where neither is known."""


def is_url(path: str) -> bool:
    """Whether a path has a scheme, such as s3://."""
    return bool(_SCHEME.match(path))


def absolute(path: str) -> str:
    """A local path made absolute (`~` and file:// too); URLs unchanged."""
    if path.startswith("file://"):
        path = unquote(path[len("file://") :])
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def lies_in(path: str, folder: str) -> bool:
    """Whether an absolute path or URL is a folder, or is below it."""
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def redact(path: str) -> str:
    """A URL without `user:secret@` and without the values of secret query keys."""
    if not is_url(path):
        return path
    # abfs://container@account is an address, not a secret.
    user = r"://[^/@?]*@" if path.partition("://")[0] in {"http", "https", "s3"} else r"://[^/@?:]*:[^/@?]*@"
    return _SECRET_KEY.sub(r"\1***", re.sub(user, "://", path))


def join(folder: str, name: str) -> str:
    """A path below a folder; a URL's query stays at the end."""
    head, question, query = folder.partition("?") if is_url(folder) else (folder, "", "")
    return f"{head.rstrip('/')}/{name}{question}{query}"


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URL, and the path on it without a slash at the end.

    S3 goes to AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where one of them is set.

    :raises SpecError: for a scheme that nothing installed can open.
    """
    path = absolute(path)
    try:
        fs, root = _open(path)
    except (ValueError, ImportError, OSError) as error:
        cause = one_line(error).replace(path, redact(path))
        raise SpecError(
            f"{redact(path)} cannot be opened: {cause}; write a local path, s3://, gs://, hf:// "
            "or the URL of an installed fsspec filesystem"
        ) from error
    return fs, root.rstrip("/") or "/"


def _open(path: str) -> tuple[pafs.FileSystem, str]:
    if not is_url(path):
        return pafs.LocalFileSystem(), path
    scheme = path.partition("://")[0].lower()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        return _s3_at(endpoint, path)
    if scheme in {"s3", "gs"}:
        return pafs.FileSystem.from_uri(path)
    import fsspec

    fs, root = fsspec.core.url_to_fs(path)
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root


def _s3_at(endpoint: str, path: str) -> tuple[pafs.FileSystem, str]:
    url, server = urlsplit(path), urlsplit(endpoint)
    keys: dict[str, Any] = {}
    if url.username:
        keys = {"access_key": unquote(url.username), "secret_key": unquote(url.password or "")}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    fs = pafs.S3FileSystem(
        endpoint_override=server.netloc, scheme=server.scheme or "https", region=region, **keys
    )
    return fs, url.netloc.rpartition("@")[2] + url.path


def is_local(fs: pafs.FileSystem) -> bool:
    """Whether it is this machine's own file tree."""
    return isinstance(fs, pafs.LocalFileSystem)


def fsspec_of(fs: pafs.FileSystem) -> Any | None:
    """The fsspec filesystem inside, if it is one."""
    handler = getattr(fs, "handler", None)
    return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None


def kind_of(fs: pafs.FileSystem, path: str) -> str:
    """What lies at a path: `file`, `folder` or `nothing`."""
    kind = fs.get_file_info(path).type
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(kind, "nothing")


def stat_file(fs: pafs.FileSystem, path: str) -> tuple[int, int] | None:
    """Size in bytes and modification time in nanoseconds of a file; None where there is none."""
    inner = fsspec_of(fs)
    if inner is not None:
        try:
            # Object stores cache their listings; a change since then must be seen.
            inner.invalidate_cache()
            info = inner.info(path)
        except FileNotFoundError:
            return None
        return (int(info["size"] or 0), _identity(info)) if info["type"] == "file" else None
    info = fs.get_file_info(path)
    return (info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else None


def list_files(fs: pafs.FileSystem, root: str) -> list[SourceFile]:
    """Every file below a folder, sorted by path, but for those below a name that begins with `_` or `.`.

    Names such as `_year=2020` are partitions and stay.
    """
    files = [file for file in _walk(fs, root) if not any(map(_hidden, file.path.split("/")))]
    return sorted(files, key=lambda file: file.path)


def _walk(fs: pafs.FileSystem, root: str) -> Iterator[SourceFile]:
    inner = fsspec_of(fs)
    if inner is not None:
        for path, info in inner.find(root, detail=True).items():
            if info["type"] == "file":
                yield SourceFile(_below(root, path), int(info["size"] or 0), _identity(info))
        return
    for info in fs.get_file_info(pafs.FileSelector(root, recursive=True)):
        if info.type == pafs.FileType.File:
            yield SourceFile(_below(root, info.path), info.size, info.mtime_ns or 0)


def list_names(fs: pafs.FileSystem, root: str) -> dict[str, bool]:
    """Names directly below a folder, and whether each is a folder; empty where there is no such folder."""
    if is_local(fs):
        try:
            with os.scandir(root) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        except FileNotFoundError:
            return {}
    infos = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return {info.base_name: info.type == pafs.FileType.Directory for info in infos}


def list_versions(fs: pafs.FileSystem, root: str) -> dict[str, tuple[int, int]]:
    """Files directly below a folder, each with size and modification time in nanoseconds, 0 where it is not known."""
    if is_local(fs):
        try:
            with os.scandir(root) as entries:
                found = {entry.name: _version(entry) for entry in entries}
        except FileNotFoundError:
            return {}
        return {name: version for name, version in found.items() if version is not None}
    infos = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    files = (info for info in infos if info.type == pafs.FileType.File)
    return {info.base_name: (info.size or 0, info.mtime_ns or 0) for info in files}


def _version(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    try:
        found = entry.stat()
        return None if entry.is_dir() else (found.st_size, found.st_mtime_ns)
    except FileNotFoundError:  # deleted since the listing began
        return None


def one_line(error: BaseException) -> str:
    """An exception's message, or its type where it has none, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


READ_ERRORS = (OSError, ValueError, pa.ArrowException)
"""What pyarrow and fsspec raise for a file that is absent, forbidden, cut off or not of its format."""


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _below(root: str, path: str) -> str:
    return path[len(root) :].lstrip("/") if path.startswith(root) else path.lstrip("/")


def _identity(info: dict[str, Any]) -> int:
    """A number that changes when the file does, from what the filesystem tells of it; 0 where it tells nothing.

    The content's own ids come first: listings and single look-ups agree on them more often than on times.
    """
    value = next((info[key] for key in _IDENTITY_KEYS if info.get(key) is not None), None)
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, int | float):
        return round(value * 1_000_000) * 1000
    return zlib.crc32(str(value).encode()) if value is not None else 0
