"""Opens filesystems by path or URL, and lists and stats their files."""

from __future__ import annotations

import os
import re
import zlib
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs as pafs

from hfbatch.data.formats.base import READ_ERRORS as READ_ERRORS
from hfbatch.data.formats.base import SourceFile as SourceFile
from hfbatch.errors import SpecError
from hfbatch.errors import one_line as one_line
from hfbatch.errors import redact as redact
from hfbatch.spec.location import Location

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*(::[A-Za-z0-9+.\-]+)*://")
_CHAIN = re.compile(r"::[A-Za-z0-9+.\-]+://")
_OPTIONS = {
    "s3": (
        "region", "scheme", "endpoint_override", "allow_delayed_open", "allow_bucket_creation",
        "allow_bucket_deletion", "tls_ca_file_path", "tls_verify_certificates", "smart_defaults",
    ),
    "gs": ("scheme", "endpoint_override", "retry_limit_seconds", "project_id"),
}  # fmt: skip
"""Options that pyarrow accepts in the URL of a bucket."""
_SECRET_QUERY = re.compile(
    r"\?[^/]*(?:secret|token|passw|credential|signature|access_key)[^/=]*=", re.IGNORECASE
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


def is_url(path: str) -> bool:
    """Returns whether a path has a scheme, such as s3://."""
    return bool(_SCHEME.match(path))


def absolute(path: str) -> Location:
    """Makes a local path absolute; returns URLs unchanged.

    Expands `~`, and decodes a file:// URL as encoded by `Path.as_uri`. Links before a `..` are followed, as the system
    does when it opens a path.
    """
    full = Location(path).unmasked
    full = full.removeprefix("local://")
    if full.startswith("file://"):
        full = unquote(full[len("file://") :].removeprefix("localhost"), errors="surrogateescape")
    if is_url(full):
        return Location(path)
    full = os.path.join(os.getcwd(), os.path.expanduser(full))
    above, dots, below = full.rpartition("/..")
    if dots and below[:1] in ("", "/"):
        full = os.path.realpath(above + dots) + below
    return Location(os.path.abspath(full))


def lies_in(path: str, folder: str) -> bool:
    """Returns whether an absolute path or URL is equal to a folder or below it."""
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def real_path(path: str) -> str:
    """Returns a canonical path: a local path without links, a URL without user, options and trailing slash."""
    full = absolute(path).unmasked
    if not is_url(full):
        return os.path.realpath(full)
    scheme, _, rest = split_options(full)[0].partition("://")
    authority, slash, key = rest.partition("/")
    return f"{scheme.lower()}://{authority.rpartition('@')[2]}{slash}{key}".rstrip("/")


def printable(name: str) -> str:
    """Escapes the bytes of a file name that are not UTF-8, such as `caf\\xe9`."""
    return name.encode("utf8", "surrogateescape").decode("utf8", "backslashreplace")


def split_options(path: str) -> tuple[str, str]:
    """Splits a URL into the part up to the key and the options with their question mark.

    Options are the query of http, and for s3 and gs a query of only pyarrow's options, such as `?region=eu-west-1`.
    """
    scheme = path.partition("://")[0].lower() if is_url(path) else ""
    found = None
    if scheme in ("http", "https"):
        found = re.search(r"\?[^?]*=.*$", path, re.DOTALL)
    elif scheme in _OPTIONS:
        option = rf"(?:{'|'.join(_OPTIONS[scheme])})=(?:https?://)?[^&/?#]*"
        found = re.search(rf"\?{option}(?:&{option})*\Z", path)
    return (path[: found.start()], path[found.start() :]) if found else (path, "")


def join(folder: str, name: str) -> Location:
    """Joins a folder and a path below it; a URL's options stay at the end."""
    head, options = split_options(Location(folder).unmasked)
    return Location(f"{head.rstrip('/')}/{name}{options}")


def open_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """Returns the filesystem of a path or URL, and the path on it without a trailing slash.

    A key is taken literally, without the options that `split_options` removes. S3 uses AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL if one of them is set.

    :raises SpecError: for a scheme that no installed filesystem supports, or a key that it would not take literally.
    """
    shown = absolute(path)
    full = shown.unmasked
    if printable(full) != full:
        raise SpecError(f"{printable(shown)} is not UTF-8, as names of files have to be here; rename it")
    try:
        fs, root = _open(full)
    except (ValueError, TypeError, ImportError, OSError) as error:
        cause = one_line(error).replace(full, shown)
        raise SpecError(
            f"{shown} cannot be opened: {cause}; write a local path, s3://, gs://, hf:// "
            "or the URL of an installed fsspec filesystem"
        ) from error
    return fs, root.rstrip("/") or "/"


def _open(path: str) -> tuple[pafs.FileSystem, str]:
    if not is_url(path):
        return pafs.LocalFileSystem(), path
    scheme = path.partition("://")[0].lower()
    if scheme in _OPTIONS:
        return _open_bucket(scheme, path)
    import fsspec

    if _CHAIN.search(path):
        fs, root = fsspec.core.url_to_fs(path)
    else:
        # Without url_to_fs, which takes every `::` in a key for a chain of filesystems.
        cls = fsspec.get_filesystem_class(scheme)
        root = cls._strip_protocol(path)
        _check_key(scheme, path, root)
        fs = cls(**cls._get_kwargs_from_urls(path))
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), root


def _open_bucket(scheme: str, path: str) -> tuple[pafs.FileSystem, str]:
    """Opens a bucket by its URL without the key, since pyarrow would decode and cut the key as part of the URL."""
    url, options = split_options(path)
    authority, _, key = url.partition("://")[2].partition("/")
    user, at, bucket = authority.rpartition("@")
    if ":" in bucket or _SECRET_QUERY.search(url):
        raise ValueError(
            "it holds a secret where none is read; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write "
            f"{scheme}://KEY:SECRET@bucket with %2F for each slash in the secret"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    query = dict(parse_qsl(options[1:]))
    if scheme == "s3" and endpoint and "endpoint_override" not in query:
        fs = _s3_at(endpoint, user, query)
    else:
        fs, _ = pafs.FileSystem.from_uri(f"{scheme}://{user}{at}{bucket}{options}")
    return fs, f"{bucket}/{key}"


def _s3_at(endpoint: str, user: str, options: dict[str, str]) -> pafs.FileSystem:
    server = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    name, _, secret = user.partition(":")
    keys = {"access_key": unquote(name), "secret_key": unquote(secret)} if name else {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    chosen: dict[str, Any] = {"scheme": server.scheme or "https", "region": region, **keys, **options}
    flags = {name: text == "true" for name, text in options.items() if text in ("true", "false")}
    return pafs.S3FileSystem(endpoint_override=server.netloc, **chosen | flags)


def _check_key(scheme: str, path: str, root: str) -> None:
    """:raises ValueError: if a filesystem would not take a key literally."""
    if scheme in ("http", "https"):
        if "#" in path:
            raise ValueError(
                "# ends the address of a file on the web; write %23 where it is part of the name"
            )
        return
    key = path.partition("://")[2].partition("/")[2]
    lost = [mark for mark in "#?%" if key.count(mark) > root.count(mark)]
    if lost:
        raise ValueError(f"{' and '.join(lost)} would not be part of the name there; rename it")


def is_local(fs: pafs.FileSystem) -> bool:
    """Returns whether it is the local filesystem."""
    return isinstance(fs, pafs.LocalFileSystem)


def fsspec_of(fs: pafs.FileSystem) -> Any | None:
    """Returns the wrapped fsspec filesystem, if there is one."""
    handler = getattr(fs, "handler", None)
    return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None


def kind_of(fs: pafs.FileSystem, path: str) -> str:
    """Returns the kind of a path: `file`, `folder` or `nothing`."""
    kind = fs.get_file_info(path).type
    return {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}.get(kind, "nothing")


def stat_file(fs: pafs.FileSystem, path: str) -> tuple[int, int] | None:
    """Returns size in bytes and modification time in nanoseconds of a file; None if it does not exist."""
    inner = fsspec_of(fs)
    if inner is not None:
        try:
            # Listings of object stores are cached, and later changes must be seen.
            inner.invalidate_cache()
            info = inner.info(path)
        except FileNotFoundError:
            return None
        return (int(info["size"] or 0), identity(info)) if info["type"] == "file" else None
    info = fs.get_file_info(path)
    return (info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else None


def list_names(fs: pafs.FileSystem, root: str) -> dict[str, bool]:
    """Returns the names directly below a folder, and whether each is a folder; empty if the folder does not exist."""
    if is_local(fs):
        try:
            with os.scandir(root) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        except FileNotFoundError:
            return {}
    infos = fs.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return {info.base_name: info.type == pafs.FileType.Directory for info in infos}


def list_versions(fs: pafs.FileSystem, root: str) -> dict[str, tuple[int, int]]:
    """Returns the files directly below a folder, with size and modification time in nanoseconds, 0 if unknown."""
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


def identity(info: dict[str, Any]) -> int:
    """Returns a number that changes with the file, from the filesystem's metadata; 0 if there is none.

    Ids of the content come first: listings and single look-ups agree on them more often than on times.
    """
    value = next((info[key] for key in _IDENTITY_KEYS if info.get(key) is not None), None)
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, int | float):
        return round(value * 1_000_000) * 1000
    return zlib.crc32(str(value).encode()) if value is not None else 0


def absent_folders(path: str) -> list[str]:
    """Returns the folders of a path that do not exist, innermost first."""
    absent = []
    while path and path != "/" and not os.path.lexists(path):
        absent.append(path)
        path = os.path.dirname(path)
    return absent
