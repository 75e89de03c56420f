"""Lists the files of an input path, with their format and partitions. Opens only files without an ending."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.filesystem import (
    READ_ERRORS,
    Location,
    SourceFile,
    absolute,
    kind_of,
    lies_in,
    list_names,
    one_line,
    open_filesystem,
    printable,
    real_path,
    redact,
    split_options,
    stat_file,
)
from hfbatch.data.formats import FORMATS
from hfbatch.data.formats.base import THREADS
from hfbatch.data.formats.texttypes import fits, found_type, texts_note
from hfbatch.data.globs import MARKS, Glob
from hfbatch.data.walk import Listing, list_files
from hfbatch.errors import SpecError
from hfbatch.spec.job import InputSpec

PACKED = ("gz", "bz2", "xz", "zst", "lz4", "zip")
ENDINGS = {ending: name for name, kind in FORMATS.items() for ending in kind.endings}
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
OTHER_FORMAT = "of another format"
UNKNOWN_FORMAT = "of no format that is read, by their names"
_NO_ENDING = re.compile(r"[^.]*(\.[0-9][^.]*)*")


class Found(NamedTuple):
    """The files of an input path."""

    root_url: Location
    """The folder of the relative file names, as a URL or absolute path."""
    fs: pafs.FileSystem
    root: str
    """The same folder as a path on `fs`."""
    listing: Listing


def partition_keys(file: str) -> dict[str, str | None]:
    """Returns the `key=value` folders of a relative path, URL-decoded; None for Hive's null."""
    pairs = [folder.partition("=") for folder in file.split("/")[:-1] if "=" in folder]
    return {
        _decoded(key): None if value == NO_PARTITION else _decoded(value) for key, _, value in pairs if key
    }


def _decoded(text: str) -> str:
    """Decodes percent-encoding in a folder's name; returns it unchanged if it is not valid UTF-8."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text


def find_files(path: str) -> Found:
    """Finds the files of a folder, file or glob, sorted, each once. A path that exists literally is not a glob.

    :raises SpecError: if there is no such path or it cannot be listed.
    """
    shown = absolute(path)
    try:
        fs, root = open_filesystem(shown)
        kind = kind_of(fs, root)
        if kind == "folder":
            return Found(shown, fs, root, list_files(fs, root))
        if kind == "file":
            return _single(shown, fs, root)
        if _has_marks(shown):
            return _find_glob(shown)
        raise SpecError(f"input.path {shown} does not exist{_neighbours(fs, root)}")
    except OSError as error:
        raise SpecError(f"input.path {shown} cannot be listed: {one_line(error)}") from error


def _single(shown: Location, fs: pafs.FileSystem, root: str) -> Found:
    head, options = split_options(shown.unmasked)
    query = options if root.endswith(options) else ""
    if redact(f"http://{query}") != f"http://{query}":
        raise SpecError(
            f"input.path {shown} holds a secret that would be written beside every row; download the "
            "file, or name it in its bucket (s3://...)"
        )
    folder, _, name = root.removesuffix(query).rpartition("/")
    size, mtime_ns = stat_file(fs, root) or (0, 0)
    above = _folder(head.split("/")[:-1], options)
    return Found(above, fs, folder or "/", Listing([SourceFile(name + query, size, mtime_ns)]))


def _find_glob(shown: Location) -> Found:
    base, glob = _fixed(shown)
    fs, root = open_filesystem(base)
    if kind_of(fs, root) != "folder":
        raise SpecError(f"input.path {shown}: there is no folder {base}{_neighbours(fs, root)}")
    listing = list_files(fs, root, glob)
    if not listing.files:
        files = [file.path for file in list_files(fs, root).files]
        raise SpecError(
            f"input.path {shown} matches none of the {len(files)} files below {base}{_some(files)}"
            f"{_without(listing.left_out)}"
        )
    return Found(base, fs, root, listing)


def _has_marks(path: Location) -> bool:
    return any(mark in split_options(path.unmasked)[0] for mark in MARKS)


def _fixed(path: Location) -> tuple[Location, Glob]:
    """Returns the base folder of a glob, and the glob below it; a part that exists literally is not a glob.

    :raises OSError: if an object store cannot be listed.
    """
    head, options = split_options(path.unmasked)
    parts = head.rstrip("/").split("/")
    for at, part in enumerate(parts):
        if any(mark in part for mark in MARKS):
            below = _folder(parts[: at + 1], options)
            if kind_of(*open_filesystem(below)) == "nothing":
                return _folder(parts[:at], options), Glob("/".join(parts[at:]))
    return path, Glob()


def _folder(parts: list[str], options: str) -> Location:
    """Joins a path's first parts. A trailing slash keeps a name like `?a=b` from being taken for options."""
    path = "/".join(parts) or "/"
    return Location(path + (options or "/" * bool(split_options(path)[1])))


def reads(path: str, output: str) -> bool:
    """Returns whether an input path would read files of an output: its folder, or matches of its glob, contain it.

    :raises SpecError: for a path that cannot be opened.
    """
    base, glob = absolute(path), Glob()
    try:
        if _has_marks(base):
            base, glob = _fixed(base)
    except OSError as error:
        raise SpecError(f"input.path {base} cannot be listed: {one_line(error)}") from error
    source, target = real_path(base), real_path(output)
    return lies_in(target, source) and bool(glob.walk(target[len(source) :]))


def _neighbours(fs: pafs.FileSystem, root: str) -> str:
    folder = root.rpartition("/")[0] or "/"
    return _some(sorted(list_names(fs, folder)))


def _some(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:8]))
    return f" (there is: {shown}{', …' if len(names) > 8 else ''})" if names else ""


def _without(left_out: dict[str, str]) -> str:
    return f"; left out: {'; '.join(describe_left_out(left_out))}" if left_out else ""


def describe_left_out(left_out: Mapping[str, str]) -> list[str]:
    """Describes the paths that were left out: one line per reason, with a few of the paths."""
    reasons: dict[str, list[str]] = {}
    for path, reason in sorted(left_out.items()):
        reasons.setdefault(reason, []).append(path)
    return [
        f"{', '.join(paths[:3])}{f' and {len(paths) - 3:,} more' if len(paths) > 3 else ''} ({reason})"
        for reason, paths in reasons.items()
    ]


def choose_format(spec: InputSpec, found: Found) -> tuple[str, list[SourceFile]]:
    """Returns the format to read and the files of that format; adds the other files to `listing.left_out`.

    A file without an ending, as Hive writes Parquet, has the format whose magic bytes it begins with.

    :raises SpecError: if there are no files, or their format is unknown or ambiguous.
    """
    shown, listing = absolute(spec.path), found.listing
    if not listing.files:
        raise SpecError(
            f"input.path {shown} holds no files (names that begin with _ or . do not count)"
            f"{_without(listing.left_out)}"
        )
    formats = {file.path: _format_of(file.path) for file in listing.files}
    magic = {
        start: name for name, kind in FORMATS.items() if spec.format in ("auto", name) for start in kind.magic
    }
    if magic:
        formats |= _formats_of_nameless(found, magic)
    file_format = _one_format(shown, formats) if spec.format == "auto" else spec.format
    chosen = [file for file in listing.files if formats[file.path] == file_format]
    if not chosen:  # the spec gives the format of files with unknown endings
        return file_format, listing.files
    for path, kind in formats.items():
        if kind != file_format:
            listing.left_out[path] = OTHER_FORMAT if kind else UNKNOWN_FORMAT
    return file_format, chosen


def _one_format(shown: Location, formats: dict[str, str | None]) -> str:
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
    packed = [path for path in formats if _is_packed(path)]
    if packed:
        raise SpecError(
            f"input.path {shown} holds compressed files, which are not read{_some(packed)}; unpack them, or leave them "
            "out with a glob such as *.jsonl"
        )
    (file_format,) = counts
    return file_format


def _formats_of_nameless(found: Found, magic: Mapping[bytes, str]) -> dict[str, str]:
    """Returns the formats of files without an ending by their first bytes.

    An unreadable file gets the first of the formats, so that it is reported.

    :param magic: formats by what their files begin with.
    """
    nameless = [
        file.path for file in found.listing.files if _NO_ENDING.fullmatch(file.path.rpartition("/")[2])
    ]
    any_format, longest = next(iter(magic.values())), max(map(len, magic))

    def format_of(path: str) -> str | None:
        """Returns the format of a file; None if its first bytes are of no format."""
        if path in found.listing.unreadable:
            return any_format
        try:
            with found.fs.open_input_stream(f"{found.root}/{path}") as stream:
                first = stream.read(longest)
        except READ_ERRORS:
            return any_format
        return next((name for start, name in magic.items() if first.startswith(start)), None)

    with ThreadPoolExecutor(THREADS) as pool:
        formats = dict(zip(nameless, pool.map(format_of, nameless), strict=True))
    return {path: name for path, name in formats.items() if name is not None}


def _is_packed(path: str) -> bool:
    """Returns whether a file is a compressed file of a known format."""
    stem, _, ending = path.rpartition(".")
    return ending.lower() in PACKED and _format_of(stem) is not None


def _format_of(path: str) -> str | None:
    return ENDINGS.get("." + path.rpartition(".")[2].lower())


def partition_types(
    files: list[SourceFile], known: Mapping[str, pa.DataType] | None = None, notes: list[str] | None = None
) -> dict[str, pa.DataType]:
    """Returns the columns of `key=value` folders: int64 if every value is in int64's canonical form, else string.

    So `zip=01234` and `n=٣` stay texts.

    :param known: types that are given.
    :param notes: receives notes on columns that look like numbers and stay texts.
    """
    values: dict[str, set[str | None]] = {}
    for folder in {file.path.rpartition("/")[0] for file in files}:
        for key, value in partition_keys(folder + "/").items():
            values.setdefault(key, set()).add(value)
    # Sorted, since the order of a set is not deterministic.
    types = dict.fromkeys(sorted(values), pa.string()) | dict(known or {})
    stayed = []
    for key in values.keys() - (known or {}).keys():
        found, why = found_type(pa.array(sorted(filter(None, values[key])), pa.string()))
        # A folder such as `n=NA` or `n=` has a value: only NO_PARTITION means null.
        fit = all(value is None or fits(value, found, exact=True) for value in values[key])
        types[key] = pa.int64() if fit and found.equals(pa.int64()) else pa.string()
        stayed += [f"{key} ({why})"] if why else []
    if notes is not None:
        notes += texts_note(sorted(stayed))
    return {key: types[key] for key in sorted(values)}
