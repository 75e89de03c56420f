"""JSONL: its columns are found in a sample, since files have no header."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.formats import jsonl, sampling
from hfbatch.data.formats.base import READ_ERRORS, THREADS, Footer, Parsed, Schemas, SourceFile, Types, Wanted
from hfbatch.data.formats.jsonltypes import infer
from hfbatch.data.formats.lines import newlines, refuse_utf16
from hfbatch.data.formats.sampling import Inferred
from hfbatch.data.formats.textfiles import TextFormat
from hfbatch.errors import one_line

MOST_NAMED = 5
"""Most columns or files in a note."""


class JsonlFormat(TextFormat):
    """One JSON object per line; a line that is blank is no row."""

    title = "JSONL"
    nested = True

    def schemas(self, fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> Schemas:
        """Finds the common columns of all files."""
        made = Schemas()
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
        made.footers[first.path] = Footer(pa.schema(columns))
        made.notes = [*sampling.bad_rows(sampled), *list(dict.fromkeys(made.notes))[:MOST_NAMED]]
        return made

    def ends_of_rows(self, view: np.ndarray, path: str, final: bool) -> np.ndarray:
        """Returns the line feeds."""
        return newlines(view)

    def starts_of_rows(self, view: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the starts of lines that are not blank."""
        return jsonl.starts_of_rows(view, ends)

    def parse(self, data: bytes, path: str, names: list[str], wanted: Wanted) -> Parsed:
        """Parses the lines."""
        return jsonl.parse(data, wanted)


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
    least = sampling.FIRST_BYTES
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
    offsets = np.linspace(0, int(ends[-1]), sampling.BLOCKS + 1)[1:] - sampling.BLOCK_BYTES
    at = np.unique(offsets.astype(np.int64))
    found = []
    for offset in at[at >= sampling.FIRST_BYTES // 2].tolist():
        number = int(np.searchsorted(ends, offset, "right"))
        found.append((files[number], offset - int(ends[number]) + files[number].size))
    return found


def _block(fs: pafs.FileSystem, path: str, offset: int) -> bytes:
    """Reads whole lines from the middle of a file; none if it cannot be read, which is reported later."""
    try:
        with fs.open_input_file(path) as file:
            data: bytes = file.read_at(sampling.BLOCK_BYTES, offset)
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
