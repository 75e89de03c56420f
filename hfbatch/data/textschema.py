"""Finds the columns of JSONL and CSV files and their types: from the spec, an earlier run, or a sample.

The sample is the first MiB of the first file with rows, and a few blocks spread evenly over all files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.filesystem import READ_ERRORS, SourceFile, one_line
from hfbatch.data.formats import csvfiles
from hfbatch.data.formats.jsonltypes import Inferred, infer
from hfbatch.data.formats.lines import refuse_utf16
from hfbatch.data.formats.texttypes import found_type, texts_note

THREADS = 16
FIRST_BYTES = 1 << 20
BLOCK_BYTES = 64 << 10
BLOCKS = 15
MOST_NAMED = 5
"""Most columns or files in a note."""


@dataclass(frozen=True)
class Types:
    """Types of columns that are known before rows are sampled."""

    given: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types in the spec; they take precedence."""
    kept: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types of an earlier run on the same output."""
    section: str = "input"
    """The section of the spec with the types, for messages."""

    @property
    def known(self) -> dict[str, pa.DataType]:
        """The types in the spec and of an earlier run."""
        return {**self.kept, **self.given}

    def without(self, names: Collection[str]) -> Types:
        """Returns the types of the other columns."""
        given, kept = ({n: k for n, k in of.items() if n not in names} for of in (self.given, self.kept))
        return Types(given, kept, self.section)


@dataclass
class TextSchemas:
    """The schemas of text files, found before their rows are read."""

    schemas: dict[str, pa.Schema] = field(default_factory=dict)
    """Columns by file; for JSONL, the columns of all files under the name of one."""
    broken: dict[str, str] = field(default_factory=dict)
    """Files that cannot be read, and why."""
    notes: list[str] = field(default_factory=list)
    """Warnings, one sentence each."""


def jsonl_schemas(fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> TextSchemas:
    """Finds the common columns of all JSONL files, which have no header."""
    made = TextSchemas()
    first, found = _first_with_rows(fs, root, files, types, made.broken)
    if first is None:
        if not made.broken:
            made.broken[files[0].path] = "no file has a row, so that the columns are unknown"
        return made
    places = _spread(files)
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = list(pool.map(lambda place: _block(fs, f"{root}/{place[0].path}", place[1]), places))
    sampled = [(first.path, found)]
    for (file, _), data in zip(places, blocks, strict=True):
        try:
            sampled.append((file.path, infer(data, types.known, types.given.keys(), types.section)))
        except ValueError as error:
            made.notes.append(f"some rows of {file.path} will be rejects: {error}")
    columns = dict(types.kept)
    for path, one in sampled:
        _merge(columns, one.schema, path, types, made.notes)
    columns |= {
        name: kind
        for name, kind in types.given.items()
        if name in columns or _is_mentioned(fs, root, files, name)
    }
    made.schemas[first.path] = pa.schema(columns)
    made.notes = [*_bad_rows(sampled), *list(dict.fromkeys(made.notes))[:MOST_NAMED]]
    return made


def _first_with_rows(
    fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types, broken: dict[str, str]
) -> tuple[SourceFile | None, Inferred]:
    for file in files:
        try:
            data = _head(fs, f"{root}/{file.path}") if file.size else b""
            refuse_utf16(data)
            found = infer(data, types.known, types.given.keys(), types.section)
        except READ_ERRORS as error:
            broken[file.path] = one_line(error)
            continue
        if found.schema.names:
            return file, found
    return None, Inferred(pa.schema([]), 0)


def _head(fs: pafs.FileSystem, path: str) -> bytes:
    """Reads whole lines from the beginning of a file, at least one of them not blank."""
    least = FIRST_BYTES
    with fs.open_input_file(path) as file:
        while True:
            data: bytes = file.read_at(least, 0)
            whole, end, _ = data.rpartition(b"\n")
            if len(data) < least or (end and whole.strip()):
                return data if len(data) < least else whole
            least *= 8


def _spread(files: list[SourceFile]) -> list[tuple[SourceFile, int]]:
    """Returns positions spread evenly over the bytes of the files: a file and a byte offset in it."""
    ends = np.cumsum([file.size for file in files])
    offsets = np.linspace(0, int(ends[-1]), BLOCKS + 1)[1:] - BLOCK_BYTES
    at = np.unique(offsets.astype(np.int64))
    found = []
    for offset in at[at >= FIRST_BYTES // 2].tolist():
        number = int(np.searchsorted(ends, offset, "right"))
        found.append((files[number], offset - int(ends[number]) + files[number].size))
    return found


def _block(fs: pafs.FileSystem, path: str, offset: int) -> bytes:
    """Reads whole lines from the middle of a file; none if it cannot be read, which is reported later."""
    try:
        with fs.open_input_file(path) as file:
            data: bytes = file.read_at(BLOCK_BYTES, offset)
            whole = offset + len(data) == file.size()
    except READ_ERRORS:
        return b""
    if offset:
        data = data.partition(b"\n")[2]
    return data if whole else data.rpartition(b"\n")[0]


def _merge(
    columns: dict[str, pa.DataType], schema: pa.Schema, path: str, types: Types, notes: list[str]
) -> None:
    """Merges the columns of a block into the known columns."""
    for new in schema:
        before = columns.get(new.name)
        if before is None or new.name in types.known:
            columns.setdefault(new.name, new.type)
        elif not before.equals(new.type):
            try:
                both = [pa.schema([(new.name, kind)]) for kind in (before, new.type)]
                columns[new.name] = pa.unify_schemas(both, promote_options="permissive").field(0).type
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                notes.append(
                    f"column {new.name!r} is {before}, but {new.type} in some rows of {path}, which will be rejects; fix "
                    f"them, or read the column as text with {types.section}.types: {{{new.name}: string}}"
                )


def _bad_rows(sampled: list[tuple[str, Inferred]]) -> list[str]:
    bad = [(path, one) for path, one in sampled if one.bad]
    if not bad:
        return []
    rows, count = sum(one.rows for _, one in sampled), sum(one.bad for _, one in bad)
    return [
        f"{count:,} of {rows:,} sampled rows cannot be read and will be rejects; the first, in {bad[0][0]}: "
        f"{bad[0][1].first}"
    ]


def _is_mentioned(fs: pafs.FileSystem, root: str, files: list[SourceFile], name: str) -> bool:
    """Returns whether a key occurs anywhere in the files; reads them up to its first occurrence."""
    keys = {json.dumps(name).encode(), json.dumps(name, ensure_ascii=False).encode()}
    longest = max(map(len, keys))
    for file in files:
        tail = b""
        with fs.open_input_stream(f"{root}/{file.path}") as stream:
            while chunk := stream.read(16 << 20):
                data = tail + chunk
                if any(key in data for key in keys):
                    return True
                tail = data[-longest:]
    return False


def csv_schemas(fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> TextSchemas:
    """Finds the columns of each file from its header, and types from the first rows of a few files."""
    made = TextSchemas()

    def names(file: SourceFile) -> list[str] | str:
        try:
            with fs.open_input_file(f"{root}/{file.path}") as stream:
                return csvfiles.header(stream, file.path)
        except READ_ERRORS as error:
            return one_line(error)

    with ThreadPoolExecutor(THREADS) as pool:
        headers = dict(zip((file.path for file in files), pool.map(names, files), strict=True))
    made.broken = {path: found for path, found in headers.items() if isinstance(found, str)}
    known = {path: found for path, found in headers.items() if found and not isinstance(found, str)}
    if not known and not made.broken:
        made.broken[files[0].path] = "no file has a header, so that the columns are unknown"
    found = _csv_types(fs, root, list(known), types, made)
    for path, columns in known.items():
        if path not in made.broken:
            made.schemas[path] = pa.schema([(name, found.get(name, pa.string())) for name in columns])
    return made


def _csv_types(
    fs: pafs.FileSystem, root: str, paths: list[str], types: Types, made: TextSchemas
) -> dict[str, pa.DataType]:
    """Finds types of columns from the first file and some others; adds warnings to `made`."""
    places = np.linspace(0, len(paths) - 1, min(len(paths), BLOCKS + 1)).astype(int)
    some = [paths[at] for at in np.unique(places)]

    def sample(path: str) -> Any:
        try:
            with fs.open_input_file(f"{root}/{path}") as stream:
                return csvfiles.sample(stream, path, FIRST_BYTES if path == paths[0] else BLOCK_BYTES)
        except READ_ERRORS as error:
            return one_line(error)

    values: dict[str, list[pa.Array]] = {}
    sampled: list[tuple[str, Inferred]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for path, found in zip(some, pool.map(sample, some), strict=True):
            if isinstance(found, str):
                made.broken[path] = found
                continue
            first = found.bad[0].message if found.bad else ""
            sampled.append((path, Inferred(found.table.schema, len(found.table), len(found.bad), first)))
            for name in found.table.column_names:
                values.setdefault(name, []).extend(found.table[name].drop_null().chunks)
    made.notes += _bad_rows(sampled)
    known = types.known
    stayed = []
    for name, chunks in values.items():
        if name not in known:
            known[name], why = found_type(pa.concat_arrays([pa.array([], pa.string()), *chunks]))
            stayed += [f"{name} ({why})"] if why else []
    made.notes += texts_note(stayed)
    return known
