"""Formats whose rows are lines of text: finds where rows begin, and reads a byte range of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow.fs as pafs

from hfbatch.data.formats.base import SPLIT_BYTES, Footer, Format, Parsed, Piece, SourceFile, Wanted
from hfbatch.data.formats.lines import BOM, MOST_ROW_BYTES
from hfbatch.errors import SplitError

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """A range of rows in a file and its byte range, ends excluded."""

    start: int
    stop: int
    first_byte: int
    end_byte: int


@dataclass
class _End:
    """The number of bytes read from a stream."""

    bytes: int = 0


class TextFormat(Format):
    """A format whose rows are lines of text, or several lines in quotes."""

    lines = True
    typed = False
    scans = True
    header_rows: ClassVar[int] = 0
    """Rows at the beginning of a file that are no rows of data. Without them, a byte order mark is skipped."""

    @abstractmethod
    def ends_of_rows(self, view: np.ndarray, path: str, final: bool) -> np.ndarray:
        """Returns the positions of the line feeds that end a row, int64.

        :param view: uint8 bytes that begin with a row.
        :param final: whether no more bytes follow.
        """

    @abstractmethod
    def starts_of_rows(self, view: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the starts of rows that are not blank, int64. :param ends: the result of `ends_of_rows`."""

    def names(self, file: Any, path: str) -> list[str]:
        """Returns the names in a file's header; none if files have no header."""
        return []

    @abstractmethod
    def parse(self, data: bytes, path: str, names: list[str], wanted: Wanted) -> Parsed:
        """Parses the rows in some bytes; columns that the file lacks are null. :param names: the names of its header."""

    def cut(
        self,
        fs: pafs.FileSystem,
        path: str,
        file: SourceFile,
        footer: Footer | None,
        split_rows: int,
        limit: int | None,
    ) -> tuple[list[Piece], int]:
        """Cuts a file where rows begin."""
        runs = self.scan(fs, path, split_rows, SPLIT_BYTES, limit)
        return [
            Piece(file.path, r.start, r.stop, file.size, file.mtime_ns, (r.first_byte, r.end_byte))
            for r in runs
        ], file.size

    def scan(
        self, fs: pafs.FileSystem, path: str, split_rows: int, split_bytes: int, limit: int | None = None
    ) -> list[Run]:
        """Cuts a file into runs of at most split_rows rows and about split_bytes bytes; at least one run.

        :param limit: number of rows after which to stop.
        """
        runs: list[Run] = []
        row = first_row = 0
        first_byte = -1
        with fs.open_input_stream(path) as stream:
            end = _End()
            for starts in self._without_header(self._line_starts(stream, path, end)):
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

    def _without_header(self, chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        header = self.header_rows
        for starts in chunks:
            if len(starts) > header:
                yield starts[header:]
            header -= min(header, len(starts))

    def _line_starts(self, stream: Any, path: str, end: _End) -> Iterator[np.ndarray]:
        """Yields the byte offsets of rows, one array per chunk, and counts the bytes read."""
        tail, base = b"", 0
        while chunk := stream.read(max(CHUNK_BYTES, len(BOM))):
            if not end.bytes and not self.header_rows and chunk.startswith(BOM):
                end.bytes = base = len(BOM)
                chunk = chunk[base:]
            end.bytes += len(chunk)
            data = tail + chunk
            view = np.frombuffer(data, np.uint8)
            ends = self.ends_of_rows(view, path, final=False)
            if not len(ends):
                if len(data) > MOST_ROW_BYTES:
                    raise ValueError(
                        f"the row at byte {base} is longer than 1 GiB; is a quote left open there?"
                    )
                tail = data
                continue
            yield base + self.starts_of_rows(view, ends)
            cut = int(ends[-1]) + 1
            tail, base = data[cut:], base + cut
        if tail:
            view = np.frombuffer(tail + b"\n", np.uint8)
            yield base + self.starts_of_rows(view, self.ends_of_rows(view, path, final=True))

    def read(self, fs: pafs.FileSystem, path: str, piece: Piece, wanted: Wanted, most: int) -> Parsed:
        """Reads the bytes of a piece and parses them."""
        span = piece.bytes_range or (0, piece.size)
        with fs.open_input_file(path) as file:
            names = self.names(file, path)
            data = file.read_at(span[1] - span[0], span[0])
        found = self.parse(data, path, names, wanted)
        if wanted.schema.names and len(found.table) != piece.stop - piece.start:
            raise SplitError(
                f"{piece.file} has {len(found.table)} rows in bytes {span[0]}-{span[1]}, "
                f"but {piece.stop - piece.start} were counted there; run again"
            )
        return found
