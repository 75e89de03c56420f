"""Which files an input path stands for, their format and their partitions. Opens none of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from hfbatch.data.filesystem import (
    SourceFile,
    absolute,
    is_url,
    kind_of,
    list_files,
    list_names,
    one_line,
    open_filesystem,
    redact,
    stat_file,
)
from hfbatch.data.texttypes import found_type, texts_note
from hfbatch.errors import SpecError
from hfbatch.spec import InputSpec

PACKED = ("gz", "bz2", "xz", "zst", "lz4", "zip")
ENDINGS = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class Found(NamedTuple):
    """What an input path stands for."""

    root_url: str
    """The folder that file names are relative to, as a URL or absolute path."""
    fs: pafs.FileSystem
    root: str
    """The same folder as a path on fs."""
    files: list[SourceFile]


def partition_keys(file: str) -> dict[str, str | None]:
    """The `key=value` folders of a relative path, URL-decoded; None where the value is hive's null."""
    pairs = [folder.partition("=") for folder in file.split("/")[:-1] if "=" in folder]
    return {unquote(key): None if value == NO_PARTITION else unquote(value) for key, _, value in pairs if key}


def find_files(path: str) -> Found:
    """The files that a folder, file or glob stands for, sorted.

    :raises SpecError: when there is no such path or it cannot be listed.
    """
    path = absolute(path)
    head, query = _split_query(path)
    try:
        fs, root = open_filesystem(path)
        kind = kind_of(fs, root)
        if kind == "folder":
            return Found(path, fs, root, list_files(fs, root))
        if kind == "file":
            if "?" in root and redact(path) != path:
                raise SpecError(
                    f"input.path {redact(path)} holds a secret that would be written beside every row; download the "
                    "file, or name it in its bucket (s3://...)"
                )
            folder, _, name = root.rpartition("/")
            size, mtime_ns = stat_file(fs, root) or (0, 0)
            return Found(
                (head.rpartition("/")[0] or "/") + query,
                fs,
                folder or "/",
                [SourceFile(name, size, mtime_ns)],
            )
        if any(mark in head for mark in "*?["):
            return _find_glob(head, query)
        raise SpecError(f"input.path {redact(path)} does not exist{_neighbours(fs, root)}")
    except OSError as error:
        raise SpecError(f"input.path {redact(path)} cannot be listed: {one_line(error)}") from error


def _find_glob(head: str, query: str) -> Found:
    parts = head.split("/")
    fixed = next(at for at, part in enumerate(parts) if any(mark in part for mark in "*?["))
    base = "/".join(parts[:fixed]) or "/"
    fs, root = open_filesystem(base + query)
    if kind_of(fs, root) != "folder":
        raise SpecError(
            f"input.path {redact(head)}: there is no folder {redact(base)}{_neighbours(fs, root)}"
        )
    pattern = re.compile(glob_translate("/".join(parts[fixed:])))
    files = list_files(fs, root)
    chosen = [file for file in files if _matches(pattern, file.path)]
    if not chosen:
        raise SpecError(
            f"input.path {redact(head)} matches none of the {len(files)} files below {redact(base)}"
            f"{_some([file.path for file in files])}"
        )
    return Found(base + query, fs, root, chosen)


def _matches(pattern: re.Pattern[str], path: str) -> bool:
    """Whether a glob matches a file or one of the folders that it lies in."""
    parts = path.split("/")
    return any(pattern.match("/".join(parts[:count])) for count in range(len(parts), 0, -1))


def _split_query(path: str) -> tuple[str, str]:
    """A URL and its query with the question mark; a question mark before no key is part of a glob."""
    found = re.search(r"\?[A-Za-z_]+=.*$", path) if is_url(path) else None
    return (path[: found.start()], path[found.start() :]) if found else (path, "")


def _neighbours(fs: pafs.FileSystem, root: str) -> str:
    folder = root.rpartition("/")[0] or "/"
    return _some(sorted(list_names(fs, folder)))


def _some(names: list[str]) -> str:
    return f" (there is: {', '.join(names[:8])}{', …' if len(names) > 8 else ''})" if names else ""


def choose_format(spec: InputSpec, files: list[SourceFile]) -> tuple[str, list[SourceFile]]:
    """The format to read, and the files that have it.

    :raises SpecError: when there are no files, or the format is unknown or not the same for all.
    """
    shown = redact(absolute(spec.path))
    if not files:
        raise SpecError(f"input.path {shown} holds no files (names that begin with _ or . do not count)")
    formats = {file.path: _format_of(file.path) for file in files}
    if spec.format != "auto":
        chosen = [file for file in files if formats[file.path] == spec.format]
        return spec.format, chosen or files
    counts = Counter(kind for kind in formats.values() if kind)
    if not counts:
        raise SpecError(
            f"input.path {shown} holds no file that ends in {', '.join(ENDINGS)}{_some(list(formats))}; "
            "say which format they have with input.format (compressed text must be unpacked)"
        )
    if len(counts) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise SpecError(
            f"input.path {shown} holds files of several formats ({found}); choose one with input.format"
        )
    packed = [file.path for file in files if _is_packed(file.path)]
    if packed:
        raise SpecError(
            f"input.path {shown} holds compressed files, which are not read{_some(packed)}; unpack them, or leave them "
            "out with a glob such as *.jsonl"
        )
    (file_format,) = counts
    return file_format, [file for file in files if formats[file.path]]


def _is_packed(path: str) -> bool:
    """Whether a file is one that would be read, compressed."""
    stem, _, ending = path.rpartition(".")
    return ending.lower() in PACKED and _format_of(stem) is not None


def _format_of(path: str) -> str | None:
    return ENDINGS.get("." + path.rpartition(".")[2].lower())


def partition_types(
    files: list[SourceFile], known: Mapping[str, pa.DataType] | None = None, notes: list[str] | None = None
) -> dict[str, pa.DataType]:
    """Columns that come from `key=value` folders: int64 where every value is written as int64 is, else string.

    So `zip=01234` and `n=٣` stay texts.

    :param known: types that are taken as they are.
    :param notes: gets what to mind about columns that look like numbers and stay texts.
    """
    values: dict[str, set[str | None]] = {}
    for folder in {file.path.rpartition("/")[0] for file in files}:
        for key, value in partition_keys(folder + "/").items():
            values.setdefault(key, set()).add(value)
    # Sorted, since the set of folders has no order of its own.
    types = dict.fromkeys(sorted(values), pa.string()) | dict(known or {})
    stayed = []
    for key in values.keys() - (known or {}).keys():
        found, why = found_type(pa.array(sorted(filter(None, values[key])), pa.string()))
        types[key] = pa.int64() if found.equals(pa.int64()) else pa.string()
        stayed += [f"{key} ({why})"] if why else []
    if notes is not None:
        notes += texts_note(sorted(stayed))
    return {key: types[key] for key in sorted(values)}
