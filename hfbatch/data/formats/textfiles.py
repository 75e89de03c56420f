"""Finds the rows of JSONL and CSV files, and reads a byte range of them.

A row of JSONL is a line that is not blank. A row of CSV is a line that is not empty and not the header; line feeds
in quotes do not end it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from hfbatch.data.formats import csvfiles, jsonl
from hfbatch.data.formats.lines import BOM, MOST_ROW_BYTES, Parsed, Wanted, newlines

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """A range of rows in a file and its byte range, ends excluded."""

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

    :param limit: number of rows after which to stop.
    """
    runs: list[Run] = []
    row = first_row = 0
    first_byte = -1
    with fs.open_input_stream(path) as stream:
        end, chunks = _row_starts(stream, path, file_format)
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
    """The number of bytes read from a stream."""

    bytes: int = 0


def _row_starts(stream: Any, path: str, file_format: str) -> tuple[_End, Iterator[np.ndarray]]:
    """Returns a running end of file, and the byte offsets of rows: one array, never empty, per chunk."""
    end = _End()
    return end, _without_header(_line_starts(stream, path, file_format, end), file_format)


def _without_header(chunks: Iterator[np.ndarray], file_format: str) -> Iterator[np.ndarray]:
    header = 1 if file_format == "csv" else 0
    for starts in chunks:
        if len(starts) > header:
            yield starts[header:]
        header -= min(header, len(starts))


def _line_starts(stream: Any, path: str, file_format: str, end: _End) -> Iterator[np.ndarray]:
    tail, base = b"", 0
    while chunk := stream.read(max(CHUNK_BYTES, len(BOM))):
        if not end.bytes and file_format == "jsonl" and chunk.startswith(BOM):
            end.bytes = base = len(BOM)
            chunk = chunk[base:]
        end.bytes += len(chunk)
        data = tail + chunk
        view = np.frombuffer(data, np.uint8)
        ends = _ends(view, path, file_format, final=False)
        if not len(ends):
            if len(data) > MOST_ROW_BYTES:
                raise ValueError(f"the row at byte {base} is longer than 1 GiB; is a quote left open there?")
            tail = data
            continue
        yield base + _starts(view, ends, file_format)
        cut = int(ends[-1]) + 1
        tail, base = data[cut:], base + cut
    if tail:
        view = np.frombuffer(tail + b"\n", np.uint8)
        yield base + _starts(view, _ends(view, path, file_format, final=True), file_format)


def _ends(view: np.ndarray, path: str, file_format: str, final: bool) -> np.ndarray:
    if file_format == "csv":
        return csvfiles.ends_of_rows(view, csvfiles.delimiter_of(path), final)
    return newlines(view)


def _starts(view: np.ndarray, ends: np.ndarray, file_format: str) -> np.ndarray:
    return (csvfiles if file_format == "csv" else jsonl).starts_of_rows(view, ends)


def read_range(
    fs: pafs.FileSystem, path: str, file_format: str, span: tuple[int, int], wanted: Wanted
) -> Parsed:
    """Reads the rows in a byte range of a file; columns that the file lacks are null."""
    with fs.open_input_file(path) as file:
        names = csvfiles.header(file, path) if file_format == "csv" else []
        data = file.read_at(span[1] - span[0], span[0])
    if file_format == "csv":
        return csvfiles.parse(data, path, names, wanted)
    return jsonl.parse(data, wanted)
