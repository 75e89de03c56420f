"""JSONL and CSV files: where rows begin, what columns they have, and reading a byte range of them.

Knows nothing of splits. A row of JSONL is a line that is not blank; a row of CSV is one that pyarrow reads
(RFC 4180: a line ends only where the number of quotes so far is even), the header excluded.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.json

CHUNK_BYTES = 16 << 20
_INFER_BYTES = 1 << 20
_MOST_ROW_BYTES = 1 << 30
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _QUOTE, _RETURN, _SPACE = 10, 34, 13, 32


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a file and the bytes that hold them, ends excluded."""

    start: int
    stop: int
    first_byte: int
    end_byte: int


def scan(
    fs: pafs.FileSystem,
    path: str,
    file_format: str,
    split_rows: int,
    split_bytes: int,
    limit: int | None = None,
) -> list[Run]:
    """Cuts a file into runs of at most split_rows rows and about split_bytes bytes; at least one run.

    :param limit: stop after this many rows.
    """
    runs: list[Run] = []
    row = first_row = 0
    first_byte = -1
    with fs.open_input_stream(path) as stream:
        end, chunks = _row_starts(stream, file_format)
        for starts in chunks:
            if first_byte < 0:
                first_byte = int(starts[0])
            while True:
                by_rows = first_row + split_rows - row
                by_bytes = int(np.searchsorted(starts, first_byte + split_bytes, "right"))
                by_limit = limit - row if limit is not None else len(starts)
                at = min(by_rows, by_bytes, by_limit)
                if at >= len(starts):
                    break
                runs.append(Run(first_row, row + at, first_byte, int(starts[at])))
                if at == by_limit:
                    return runs
                first_row, first_byte = row + at, int(starts[at])
            row += len(starts)
    if row > first_row or not runs:
        runs.append(Run(first_row, row, max(first_byte, 0), end.bytes if first_byte >= 0 else 0))
    return runs


@dataclass
class _End:
    """How many bytes of a stream have been read."""

    bytes: int = 0


def _row_starts(stream: Any, file_format: str) -> tuple[_End, Iterator[np.ndarray]]:
    """Byte offsets at which rows begin, one array (never empty) for each chunk, and a running end of file."""
    end = _End()
    return end, _without_header(_line_starts(stream, file_format, end), file_format)


def _without_header(chunks: Iterator[np.ndarray], file_format: str) -> Iterator[np.ndarray]:
    header = 1 if file_format == "csv" else 0
    for starts in chunks:
        if len(starts) > header:
            yield starts[header:]
        header -= min(header, len(starts))


def _line_starts(stream: Any, file_format: str, end: _End) -> Iterator[np.ndarray]:
    tail, base = b"", 0
    while chunk := stream.read(CHUNK_BYTES):
        end.bytes += len(chunk)
        data = tail + chunk
        view = np.frombuffer(data, np.uint8)
        ends = _line_ends(view, file_format)
        if not len(ends):
            if len(data) > _MOST_ROW_BYTES:
                raise ValueError(f"the row at byte {base} is longer than 1 GiB; is a quote left open there?")
            tail = data
            continue
        yield base + _filled(view, ends, file_format)
        cut = int(ends[-1]) + 1
        tail, base = data[cut:], base + cut
    if tail:
        view = np.frombuffer(tail + b"\n", np.uint8)
        yield base + _filled(view, np.array([len(tail)]), file_format)


def _line_ends(view: np.ndarray, file_format: str) -> np.ndarray:
    newlines = np.flatnonzero(view == _NEWLINE)
    if file_format == "csv":
        quotes = np.flatnonzero(view == _QUOTE)
        if len(quotes):
            newlines = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return newlines


def _filled(view: np.ndarray, ends: np.ndarray, file_format: str) -> np.ndarray:
    """Starts of the lines that are not blank."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    first = view[starts]
    if file_format == "csv":
        length = ends - starts
        return starts[(length > 1) | ((length == 1) & (first != _RETURN))]
    if (first > _SPACE).all():
        return starts
    solid = np.add.reduceat(view[: ends[-1] + 1] > _SPACE, starts, dtype=np.int64)
    return starts[solid > 0]


def read_range(
    fs: pafs.FileSystem, path: str, file_format: str, span: tuple[int, int], schema: pa.Schema
) -> pa.Table:
    """The rows in a byte range of a file; columns that the file lacks are nulls.

    :param schema: the columns to read and their types.
    """
    with fs.open_input_file(path) as file:
        names = _header(file, path) if file_format == "csv" else []
        data = file.read_at(span[1] - span[0], span[0])
    if file_format == "csv":
        return _parse_csv(data, path, names, schema)
    return _parse_jsonl(data, schema)


def _parse_jsonl(data: bytes, schema: pa.Schema | None) -> pa.Table:
    data = data.removeprefix(_BOM)
    if not data.strip():
        return (schema or pa.schema([])).empty_table()
    options = pa.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer"
    )
    # One block, since pyarrow fails on a row that does not fit in two of its blocks of 1 MiB.
    table = pa.json.read_json(pa.BufferReader(data), pa.json.ReadOptions(block_size=len(data) + 1), options)
    table.validate(full=True)  # The parser lets text through that is not UTF-8.
    return table


def _parse_csv(data: bytes, path: str, names: list[str], schema: pa.Schema | None) -> pa.Table:
    read = pa.csv.ReadOptions(column_names=names, block_size=len(data) + 1)
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(path))
    if schema is None:
        convert = pa.csv.ConvertOptions()
    else:
        convert = pa.csv.ConvertOptions(
            column_types=schema, include_columns=schema.names, include_missing_columns=True
        )
    if not data.strip(b"\r\n"):
        return (schema or pa.schema([(name, pa.null()) for name in names])).empty_table()
    return pa.csv.read_csv(pa.BufferReader(data), read, parse, convert)


def infer_schema(fs: pafs.FileSystem, path: str, file_format: str) -> pa.Schema:
    """Columns and types from the first block of a file; columns of nulls are strings.

    JSON has no dates, so that text which looks like one stays text.
    """
    with fs.open_input_file(path) as file:
        block = _first_lines(file, file_format, _INFER_BYTES)
        if file_format == "csv":
            names = _header(file, path)
            view = np.frombuffer(block, np.uint8)
            table = _parse_csv(block[int(_line_ends(view, "csv")[0]) + 1 :], path, names, None)
        else:
            table = _parse_jsonl(block, None)
    return pa.schema([(field.name, _settled(field.type, file_format)) for field in table.schema])


def csv_columns(fs: pafs.FileSystem, path: str) -> list[str]:
    """The names in a CSV file's header."""
    with fs.open_input_file(path) as file:
        return _header(file, path)


def _header(file: Any, path: str) -> list[str]:
    block = _first_lines(file, "csv", 64 << 10)
    if not block.strip():
        return []
    view = np.frombuffer(block, np.uint8)
    starts = _filled(view, _line_ends(view, "csv"), "csv")
    line = block[int(starts[0]) : int(starts[1])] if len(starts) > 1 else block
    if b"\r" in line.rstrip(b"\r\n"):
        raise ValueError(
            "its lines end in carriage returns alone, or its header holds one; save it with line feeds"
        )
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=_delimiter(path))
    names = pa.csv.read_csv(io.BytesIO(line), parse_options=parse).column_names
    refuse_repeated(names)
    return names


def refuse_repeated(names: list[str]) -> None:
    """:raises ValueError: where two columns have one name, so that one of them would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"it has more than one column named {twice[0]!r}")


def _first_lines(file: Any, file_format: str, least: int) -> bytes:
    """Whole lines from the beginning of a file, at least one of them not blank."""
    while True:
        block = file.read_at(least, 0)
        if len(block) < least:
            return block if block.endswith(b"\n") else block + b"\n"
        ends = _line_ends(np.frombuffer(block, np.uint8), file_format)
        if len(ends) and block[: ends[-1]].strip():
            return block[: ends[-1] + 1]
        if least > _MOST_ROW_BYTES:
            raise ValueError("its first row is longer than 1 GiB; is a quote left open there?")
        least *= 8


def _settled(kind: pa.DataType, file_format: str) -> pa.DataType:
    """The type to read with, where the inferred one says too little or too much."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_timestamp(kind) and file_format == "jsonl":
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type, file_format))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _settled(field.type, file_format)) for field in kind])
    return kind


def _delimiter(path: str) -> str:
    return "\t" if path.endswith(".tsv") else ","
