"""Parses CSV to rows. A row that cannot be parsed, or with an invalid value, becomes a bad row; all others are kept.

As in RFC 4180, a quote at the beginning of a field opens it, and a line ends only outside of an open field. A quote
that is never closed ends with its line. pyarrow parses all rows at once, as texts. If it finds another number of
rows, or quotes are in unusual places, each row is parsed separately.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs

from hfbatch.data.formats import sampling
from hfbatch.data.formats.base import (
    READ_ERRORS,
    THREADS,
    BadRow,
    Footer,
    Parsed,
    Schemas,
    SourceFile,
    Types,
    Wanted,
)
from hfbatch.data.formats.lines import (
    BOM,
    MOST_ROW_BYTES,
    NEWLINE,
    QUOTE,
    RETURN,
    misfit,
    newlines,
    refuse_repeated,
    refuse_utf16,
    shown,
)
from hfbatch.data.formats.sampling import Inferred
from hfbatch.data.formats.textfiles import TextFormat
from hfbatch.data.formats.texttypes import convert, found_type, texts_note
from hfbatch.errors import one_line

MOST_OPEN_BYTES = 128 << 20
"""Bytes after which a row with an open quote ends with its first line; twice the limit of a split."""


def delimiter_of(path: str) -> str:
    """Returns the delimiter of a file."""
    return "\t" if path.endswith(".tsv") else ","


def ends_of_rows(view: np.ndarray, delimiter: str, final: bool) -> np.ndarray:
    """Returns the positions of the line feeds that end a row, int64.

    :param view: uint8 bytes that begin with a row.
    :param final: whether no more bytes follow, so that open quotes are never closed; otherwise this is assumed only of
        the first row, and only beyond MOST_OPEN_BYTES.
    """
    ends = newlines(view)
    quotes = np.flatnonzero(view == QUOTE)
    if not len(quotes):
        return ends
    if _is_regular(view, quotes, delimiter, final):
        closed = ends[np.searchsorted(quotes, ends) % 2 == 0]
        if len(closed) or len(view) <= MOST_OPEN_BYTES:
            return closed
    closed_row, any_row = _row_patterns(delimiter)
    data, at = view.tobytes(), 0
    found: list[int] = []
    while at < len(data):
        row = closed_row.match(data, at)
        if row is None:
            is_last_chance = not found and len(data) > MOST_OPEN_BYTES
            if not final and not is_last_chance:
                break  # the quote may be closed in the following bytes
            row = any_row.match(data, at)
        assert row is not None  # noqa: S101 - any_row matches anything
        at = row.end()
        if data[at - 1] == NEWLINE:
            found.append(at - 1)
    return np.array(found, np.int64)


def _is_regular(view: np.ndarray, quotes: np.ndarray, delimiter: str, final: bool) -> bool:
    """Returns whether quotes alternately begin and end fields, so that counting quotes is enough."""
    opening, closing = quotes[::2], quotes[1::2]
    if final and len(opening) > len(closing):
        return False
    if view[:3].tobytes() == BOM and opening[0] == 3:
        opening = opening[1:]
    before = view[opening[opening > 0] - 1]
    after = view[closing[closing < len(view) - 1] + 1]
    is_edge = np.zeros(256, bool)
    is_edge[[ord(delimiter), NEWLINE, QUOTE]] = True
    return bool(is_edge[before].all() and (is_edge[after] | (after == RETURN)).all())


_QUOTED = re.compile(rb'"(?:[^"]++|"")*+"')
"""A quoted field. The patterns have no groups, which Python handles wrongly in possessive quantifiers."""


@lru_cache
def _row_patterns(delimiter: str) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Returns patterns of a row with its line feed: one with all quotes closed, and one that allows open quotes."""
    mark = re.escape(delimiter).encode()
    quoted, plain = rb'"(?:[^"]++|"")*+"[^%b\n]*+' % mark, rb"[^%b\n]*+" % mark
    fields = (rb'(?>%b|(?!")%b)' % (quoted, plain), rb"(?>%b|%b)" % (quoted, plain))
    closed, anything = (re.compile(rb"(?>(?:%b%b)*+%b)(?:\n|\Z)" % (f, mark, f)) for f in fields)
    return closed, anything


def starts_of_rows(view: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the starts of rows that are not empty lines. :param ends: the result of `ends_of_rows`."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts
    return starts[(length > 1) | ((length == 1) & (view[starts] != RETURN))]


def first_rows(file: Any, path: str, least: int) -> bytes:
    """Reads whole rows from the beginning of a file, at least one of them not blank."""
    while True:
        block = file.read_at(least, 0)
        if len(block) < least:
            return block if block.endswith(b"\n") else block + b"\n"
        ends = ends_of_rows(np.frombuffer(block, np.uint8), delimiter_of(path), final=False)
        if len(ends) and block[: ends[-1]].strip():
            return block[: ends[-1] + 1]
        if least > MOST_ROW_BYTES:
            raise ValueError("its first row is longer than 1 GiB; is a quote left open there?")
        least *= 8


def header(file: Any, path: str) -> list[str]:
    """Returns the names in a file's header; none if the file is empty."""
    return _names(first_rows(file, path, 64 << 10), path)[0]


def _names(block: bytes, path: str) -> tuple[list[str], int]:
    """Returns the names in a header, and the position after it."""
    refuse_utf16(block)
    if not block.strip():
        return [], len(block)
    view = np.frombuffer(block, np.uint8)
    ends = ends_of_rows(view, delimiter_of(path), final=True)
    start = int(starts_of_rows(view, ends)[0])
    stop = int(ends[np.searchsorted(ends, start)]) + 1
    line = block[start:stop]
    if b"\r" in line.rstrip(b"\r\n"):
        raise ValueError(
            "its lines end in carriage returns only, or its header holds one; save it with line feeds"
        )
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter_of(path))
    names = pa.csv.read_csv(io.BytesIO(line), parse_options=parse).column_names
    refuse_repeated(names)
    return names, stop


def sample(file: Any, path: str, least: int) -> Parsed:
    """Reads the first rows of a file as texts. :param least: bytes to read, unless a row is longer."""
    block = first_rows(file, path, least)
    names, stop = _names(block, path)
    return parse(block[stop:], path, names, Wanted(pa.schema([(name, pa.string()) for name in names])))


def parse(data: bytes, path: str, names: list[str], wanted: Wanted) -> Parsed:
    """Parses the rows in some bytes. :param names: names of the file's columns."""
    if not data.strip(b"\r\n"):
        return Parsed(wanted.schema.empty_table())
    data = data if data.endswith(b"\n") else data + b"\n"
    view = np.frombuffer(data, np.uint8)
    delimiter = delimiter_of(path)
    ends = ends_of_rows(view, delimiter, final=True)
    starts = starts_of_rows(view, ends)
    lines = _Lines(data, starts, ends[np.searchsorted(ends, starts)])
    found = _all_at_once(data, delimiter, names, wanted, len(starts))
    if found is None:
        found = _row_by_row(lines, delimiter, names, wanted)
    return _converted(found, lines, wanted)


class _Lines(Sequence[bytes]):
    """The raw rows in some bytes."""

    def __init__(self, data: bytes, starts: np.ndarray, ends: np.ndarray) -> None:
        self._data, self._starts, self._ends = data, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, at: Any) -> Any:
        if at >= len(self):
            raise IndexError(at)
        return self._data[self._starts[at] : self._ends[at]]


def _all_at_once(data: bytes, delimiter: str, names: list[str], wanted: Wanted, count: int) -> Parsed | None:
    """Parses all rows with pyarrow, as texts; returns None if something is irregular."""
    view = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(view == QUOTE)
    if len(quotes) and not _is_regular(view, quotes, delimiter, final=True):
        return None
    texts = pa.schema([(name, pa.string()) for name in wanted.schema.names])
    read = pa.csv.ReadOptions(column_names=names, block_size=len(data) + 1)
    options = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
    convert_options = pa.csv.ConvertOptions(
        column_types=texts, include_columns=texts.names, include_missing_columns=True
    )
    try:
        table = pa.csv.read_csv(pa.BufferReader(data), read, options, convert_options)
    except pa.ArrowInvalid:
        return None
    return Parsed(table) if not texts.names or len(table) == count else None


def _row_by_row(lines: _Lines, delimiter: str, names: list[str], wanted: Wanted) -> Parsed:
    """Parses each row separately, as texts."""
    places = [(name, names.index(name) if name in names else -1) for name in wanted.schema.names]
    values: dict[str, list[str | None]] = {name: [] for name, _ in places}
    bad: list[BadRow] = []
    for position, line in enumerate(lines):
        row: list[str | None] = [None] * len(places)
        try:
            fields = _fields(line, delimiter, len(names))
            row = [fields[at].decode() if at >= 0 else None for _, at in places]
        except UnicodeDecodeError as error:
            message = f"the row holds the byte {error.object[error.start]:#04x}, which is not UTF-8; save the file as UTF-8"
            bad.append(BadRow(position, "NotUTF8", message, shown(line)))
        except ValueError as error:
            bad.append(BadRow(position, "NotCSV", str(error), shown(line)))
        for (name, _), value in zip(places, row, strict=True):
            values[name].append(value)
    schema = pa.schema([(name, pa.string()) for name in values])
    return Parsed(pa.table(values, schema), bad)


def _fields(line: bytes, delimiter: str, count: int) -> list[bytes]:
    """Splits a row into fields. :raises ValueError: if quotes are wrong or the number of fields is not the header's."""
    line = line.removesuffix(b"\r")
    at = 0
    fields: list[bytes] = []
    while at <= len(line):
        quoted = _QUOTED.match(line, at)
        end = line.find(delimiter.encode(), quoted.end() if quoted else at)
        end = len(line) if end < 0 else end
        if quoted and quoted.end() < end:
            after = line[quoted.end() : end][:20].decode("utf8", "backslashreplace")
            raise ValueError(
                f"field {len(fields) + 1} has {after!r} after its closing quote; write a quote within quotes twice"
            )
        if not quoted and line.startswith(b'"', at):
            raise ValueError(
                f"a quote is left open in field {len(fields) + 1}; close it, or write a quote within quotes twice"
            )
        fields.append(line[at + 1 : end - 1].replace(b'""', b'"') if quoted else line[at:end])
        at = end + 1
    if len(fields) != count:
        raise ValueError(
            f"the row has {len(fields)} field{'s' * (len(fields) > 1)}, but the header has {count}; put a value with {delimiter!r} in quotes"
        )
    return fields


def _converted(found: Parsed, lines: _Lines, wanted: Wanted) -> Parsed:
    """Converts texts to the columns' types; a text that does not fit makes its row a bad row."""
    already = {row.position for row in found.bad}
    columns = []
    for field in wanted.schema:
        texts = found.table[field.name].combine_chunks()
        exact = field.name not in wanted.given
        column, misfits = convert(texts, field.type, exact)
        for at in np.flatnonzero(misfits).tolist():
            if at not in already:
                already.add(at)
                message = misfit(field.name, field.type, repr(texts[at].as_py()), wanted.section)
                found.bad.append(BadRow(at, "Misfit", message, shown(lines[at])))
        columns.append(column)
    table = pa.Table.from_arrays(columns, schema=wanted.schema)
    return Parsed(table, sorted(found.bad, key=lambda row: row.position))


class CsvFormat(TextFormat):
    """Fields between commas or tabs, below a header; an empty line is no row."""

    title = "CSV"
    nested = False
    header_rows = 1

    def schemas(self, fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> Schemas:
        """Finds the columns of each file from its header, and types from the first rows of a few files."""
        made = Schemas()

        def names(file: SourceFile) -> list[str] | str:
            try:
                with fs.open_input_file(f"{root}/{file.path}") as stream:
                    return header(stream, file.path)
            except READ_ERRORS as error:
                return one_line(error)

        with ThreadPoolExecutor(THREADS) as pool:
            headers = dict(zip((file.path for file in files), pool.map(names, files), strict=True))
        made.broken = {path: found for path, found in headers.items() if isinstance(found, str)}
        known = {path: found for path, found in headers.items() if found and not isinstance(found, str)}
        if not known and not made.broken:
            made.broken[files[0].path] = "no file has a header, so that the columns are unknown"
        found = _types(fs, root, list(known), types, made)
        for path, columns in known.items():
            if path not in made.broken:
                made.footers[path] = Footer(
                    pa.schema([(name, found.get(name, pa.string())) for name in columns])
                )
        return made

    def ends_of_rows(self, view: np.ndarray, path: str, final: bool) -> np.ndarray:
        """Returns the line feeds outside of quotes."""
        return ends_of_rows(view, delimiter_of(path), final)

    def starts_of_rows(self, view: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the starts of lines that are not empty."""
        return starts_of_rows(view, ends)

    def names(self, file: Any, path: str) -> list[str]:
        """Returns the names in the header."""
        return header(file, path)

    def parse(self, data: bytes, path: str, names: list[str], wanted: Wanted) -> Parsed:
        """Parses the rows, without the header."""
        return parse(data, path, names, wanted)


def _types(
    fs: pafs.FileSystem, root: str, paths: list[str], types: Types, made: Schemas
) -> dict[str, pa.DataType]:
    """Finds types of columns from the first file and some others; adds warnings to `made`."""
    places = np.linspace(0, len(paths) - 1, min(len(paths), sampling.BLOCKS + 1)).astype(int)
    some = [paths[at] for at in np.unique(places)]

    def first_sample(path: str) -> Any:
        try:
            with fs.open_input_file(f"{root}/{path}") as stream:
                return sample(
                    stream, path, sampling.FIRST_BYTES if path == paths[0] else sampling.BLOCK_BYTES
                )
        except READ_ERRORS as error:
            return one_line(error)

    values: dict[str, list[pa.Array]] = {}
    sampled: list[tuple[str, Inferred]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for path, found in zip(some, pool.map(first_sample, some), strict=True):
            if isinstance(found, str):
                made.broken[path] = found
                continue
            first = found.bad[0].message if found.bad else ""
            sampled.append((path, Inferred(found.table.schema, len(found.table), len(found.bad), first)))
            for name in found.table.column_names:
                values.setdefault(name, []).extend(found.table[name].drop_null().chunks)
    made.notes += sampling.bad_rows(sampled)
    known = types.known
    stayed = []
    for name, chunks in values.items():
        if name not in known:
            known[name], why = found_type(pa.concat_arrays([pa.array([], pa.string()), *chunks]))
            stayed += [f"{name} ({why})"] if why else []
    made.notes += texts_note(stayed)
    return known
