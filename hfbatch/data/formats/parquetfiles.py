"""Parquet: its footers hold the columns, their types and the rows of each row group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hfbatch.data.formats.base import (
    READ_ERRORS,
    SPLIT_BYTES,
    THREADS,
    Footer,
    Format,
    Parsed,
    Piece,
    Schemas,
    SourceFile,
    Types,
    Wanted,
)
from hfbatch.data.formats.rowgroups import read_rows
from hfbatch.errors import SplitError, one_line

MOST_SLICES = 16
"""Most splits of one row group."""


class ParquetFormat(Format):
    """Parquet files, cut at row groups."""

    title = "Parquet"
    lines = False
    typed = True
    nested = True
    scans = False

    def schemas(self, fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> Schemas:
        """Reads the footers of the files."""

        def read(file: SourceFile) -> Footer | str:
            try:
                return _footer(fs, f"{root}/{file.path}", file.size)
            except READ_ERRORS as error:
                return one_line(error)

        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(read, files))
        pairs = [(file.path, result) for file, result in zip(files, results, strict=True)]
        return Schemas(
            {path: result for path, result in pairs if isinstance(result, Footer)},
            {path: result for path, result in pairs if isinstance(result, str)},
        )

    def cut(
        self,
        fs: pafs.FileSystem,
        path: str,
        file: SourceFile,
        footer: Footer | None,
        split_rows: int,
        limit: int | None,
    ) -> tuple[list[Piece], int]:
        """Cuts a file by the row groups in its footer, without opening it again."""
        assert footer is not None  # noqa: S101 - `schemas` finds the footer of every file that is not broken
        ranges = cut_groups(footer.rows.tolist(), footer.sizes.tolist(), split_rows)
        cuts = [Piece(file.path, start, stop, file.size, file.mtime_ns) for start, stop, _ in ranges]
        return cuts, sum(size for _, _, size in ranges)

    def read(self, fs: pafs.FileSystem, path: str, piece: Piece, wanted: Wanted, most: int) -> Parsed:
        """Reads the row groups of a piece; only columns that the file has."""
        return Parsed(_read(fs, path, piece, wanted.schema, most))


def open_parquet(fs: pafs.FileSystem, path: str, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file of the input. :param options: options of pq.ParquetFile.

    INT96 times, which Spark and Hive write, are read as microseconds: nanoseconds only reach from 1677 to 2262, and
    times beyond would be read with a wrong year.
    """
    return pq.ParquetFile(path, filesystem=fs, coerce_int96_timestamp_unit="us", **options)


def cut_groups(rows: Sequence[int], sizes: Sequence[int], split_rows: int) -> list[tuple[int, int, int]]:
    """Cuts a Parquet file into row ranges (start, stop) with their bytes; at least one, which may be empty.

    Row groups are joined up to split_rows rows and SPLIT_BYTES. A larger row group is cut into at most MOST_SLICES
    slices: every slice reads the whole group again, so that the reading cost of more slices would exceed the gain of
    smaller splits.

    :param rows: rows of each row group.
    :param sizes: uncompressed bytes of each row group.
    """
    ranges: list[tuple[int, int, int]] = []
    start = stop = held = 0
    for count, size in zip(rows, sizes, strict=True):
        if stop > start and (stop - start + count > split_rows or held + size > SPLIT_BYTES):
            ranges.append((start, stop, held))
            start, held = stop, 0
        stop, held = stop + count, held + size
        if count > split_rows:
            slices = min(MOST_SLICES, -(-count // split_rows))
            step = -(-count // slices)
            ranges += [(at, min(at + step, stop), size // slices) for at in range(start, stop, step)]
            start, held = stop, 0
    if stop > start or not ranges:
        ranges.append((start, stop, held))
    return ranges


def _footer(fs: pafs.FileSystem, path: str, size: int) -> Footer:
    if size == 0:
        raise ValueError("the file is empty (0 bytes), which is not Parquet")
    with open_parquet(fs, path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    rows = np.fromiter((group.num_rows for group in groups), np.int64, len(groups))
    sizes = np.fromiter((group.total_byte_size for group in groups), np.int64, len(groups))
    return Footer(schema.remove_metadata(), rows, sizes, class_names(schema))


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Returns class names that `datasets` stored in a Parquet file: of ClassLabels and lists of these.

    Source: `Features.arrow_schema` in datasets' features.py.
    """
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):  # written by another library
        return {}
    named = {name: _class_label(feature) for name, feature in features.items()}
    return {name: names for name, names in named.items() if names}


def _class_label(feature: Any) -> tuple[str, ...]:
    """Returns the names of a ClassLabel or a list of these; older versions write lists as Python lists."""
    while (isinstance(feature, list) and feature) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return tuple(feature.get("names", ())) if is_label else ()


def _read(fs: pafs.FileSystem, path: str, piece: Piece, schema: pa.Schema, most: int) -> pa.Table:
    """Reads the piece's rows, at most `most` bytes together; only columns that the file has."""
    again = partial(open_parquet, fs, path)
    with again(pre_buffer=True) as file:
        metadata = file.metadata
        counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
        ends = np.cumsum(counts, dtype=np.int64)
        if piece.stop > (int(ends[-1]) if len(ends) else 0):
            raise SplitError(
                f"{piece.file} has {metadata.num_rows} rows, not {piece.stop} or more; run again"
            )
        names = [name for name in schema.names if name in file.schema_arrow.names]
        first = int(np.searchsorted(ends, piece.start, "right"))
        last = int(np.searchsorted(ends, piece.stop, "left"))
        groups = list(range(first, last + 1)) if piece.stop > piece.start else []
        skipped = piece.start - (int(ends[first - 1]) if first else 0) if groups else 0
        wanted = pa.schema([schema.field(name) for name in names])
        table = read_rows(file, again, groups, skipped, piece.stop - piece.start, wanted, most)
    if names and table.num_rows != piece.stop - piece.start:
        raise SplitError(f"{piece.file} gave {table.num_rows} rows for {piece.start}-{piece.stop}; run again")
    return table
