"""Reading one split: its columns and filter. Works from plain values alone, lists nothing, knows no task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hfbatch.data import textfiles
from hfbatch.data.filesystem import READ_ERRORS, one_line, open_filesystem, redact, stat_file
from hfbatch.data.listing import partition_keys
from hfbatch.data.rowgroups import MOST_BYTES, read_rows
from hfbatch.data.splits import Piece, Split
from hfbatch.errors import SplitError

PLACES = pa.schema([("file", pa.string()), ("row", pa.int64())])
_POSITION = "__hfbatch_position"


@dataclass(frozen=True)
class ReadPlan:
    """What a worker needs to read any split of an input."""

    path: str
    """The folder that file names are relative to, as a URL or absolute path."""
    format: str
    columns: tuple[str, ...]
    """Columns to read, those of the filter included."""
    schema: pa.Schema
    """Their types, the same in every split."""
    hive: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Columns that come from `key=value` folders."""
    filter: str | None = None
    """A SQL condition; rows for which it is not true are left out."""
    section: str = "input"
    """The part of the spec that asks for it, to name in errors."""


@dataclass
class Rows:
    """The rows of a split."""

    table: pa.Table
    """ReadPlan.columns, in that order and of those types."""
    places: pa.Table
    """`file` (string) and `row` (int64) of each row: where it comes from."""
    read: int
    """Rows before the filter."""


def read_split(split: Split, plan: ReadPlan) -> Rows:
    """Reads the rows of a split in input order and applies the filter.

    :raises SplitError: when a file is gone, changed, unreadable, or has other rows than the split says.
    """
    if split.fault is not None:
        raise SplitError(split.fault)
    fs, root = open_filesystem(plan.path)
    tables, left = [], MOST_BYTES
    for piece in split.pieces:
        left -= (piece.stop - piece.start) * (len(piece.file) + 16)  # what tells where each row is from
        tables.append(_read_piece(fs, root, piece, plan, left))
        left -= tables[-1].nbytes
    table = pa.concat_tables([plan.schema.empty_table(), *tables])
    places = pa.concat_tables([PLACES.empty_table(), *(_places(piece) for piece in split.pieces)])
    if plan.filter is None:
        return Rows(table, places, split.rows)
    kept = _positions(table, plan.filter, split.pieces[0].file, plan.section)
    return Rows(table.take(kept), places.take(kept), split.rows)


def _places(piece: Piece) -> pa.Table:
    count = piece.stop - piece.start
    return pa.table(
        [pa.repeat(pa.scalar(piece.file), count), pa.array(np.arange(piece.start, piece.stop))], PLACES
    )


def _read_piece(fs: pafs.FileSystem, root: str, piece: Piece, plan: ReadPlan, most: int) -> pa.Table:
    path = f"{root}/{piece.file}"
    count = piece.stop - piece.start
    try:
        _check_unchanged(fs, path, piece, plan)
        if plan.format == "parquet":
            found = _read_parquet(fs, path, piece, plan, most)
        else:
            names = [name for name in plan.columns if name not in plan.hive]
            schema = pa.schema([plan.schema.field(name) for name in names])
            found = _read_text(fs, path, piece, plan, schema)
        keys = partition_keys(piece.file)
        columns = [_column(name, found, keys, count, plan) for name in plan.columns]
        return pa.Table.from_arrays(columns, schema=plan.schema)
    except READ_ERRORS as error:
        raise SplitError(
            f"{piece.file} (rows {piece.start}-{piece.stop}) cannot be read: {one_line(error)}"
        ) from error


def _check_unchanged(fs: pafs.FileSystem, path: str, piece: Piece, plan: ReadPlan) -> None:
    now = stat_file(fs, path)
    if now is None:
        raise SplitError(
            f"{piece.file} is gone from {redact(plan.path)}; put it back, or run again to do without it"
        )
    size, mtime_ns = now
    # Some filesystems tell the time in a listing only: 0 is unknown.
    if size != piece.size or (mtime_ns and piece.mtime_ns and mtime_ns != piece.mtime_ns):
        raise SplitError(f"{piece.file} changed while the job ran; run again")


def _read_parquet(fs: pafs.FileSystem, path: str, piece: Piece, plan: ReadPlan, most: int) -> pa.Table:
    """The piece's rows, of `most` bytes together; only columns that the file has."""

    def again(**options: Any) -> pq.ParquetFile:
        return pq.ParquetFile(path, filesystem=fs, **options)

    with again(pre_buffer=True) as file:
        metadata = file.metadata
        counts = [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)]
        ends = np.cumsum(counts, dtype=np.int64)
        if piece.stop > (int(ends[-1]) if len(ends) else 0):
            raise SplitError(
                f"{piece.file} has {metadata.num_rows} rows, not {piece.stop} or more; run again"
            )
        names = [name for name in plan.columns if name in file.schema_arrow.names and name not in plan.hive]
        first = int(np.searchsorted(ends, piece.start, "right"))
        last = int(np.searchsorted(ends, piece.stop, "left"))
        groups = list(range(first, last + 1)) if piece.stop > piece.start else []
        skipped = piece.start - (int(ends[first - 1]) if first else 0) if groups else 0
        wanted = pa.schema([plan.schema.field(name) for name in names])
        table = read_rows(file, again, groups, skipped, piece.stop - piece.start, wanted, most)
    if names and table.num_rows != piece.stop - piece.start:
        raise SplitError(f"{piece.file} gave {table.num_rows} rows for {piece.start}-{piece.stop}; run again")
    return table


def _read_text(fs: pafs.FileSystem, path: str, piece: Piece, plan: ReadPlan, schema: pa.Schema) -> pa.Table:
    span = piece.bytes_range or (0, piece.size)
    table = textfiles.read_range(fs, path, plan.format, span, schema)
    if schema.names and table.num_rows != piece.stop - piece.start:
        raise SplitError(
            f"{piece.file} has {table.num_rows} rows in bytes {span[0]}-{span[1]}, "
            f"but {piece.stop - piece.start} lines that hold rows; it is not well-formed {plan.format.upper()} there"
        )
    return table


def _column(
    name: str, found: pa.Table, keys: Mapping[str, str | None], count: int, plan: ReadPlan
) -> pa.Array | pa.ChunkedArray:
    kind = plan.schema.field(name).type
    if name in plan.hive:
        value = keys.get(name)
        return pa.repeat(pa.scalar(value, pa.string()).cast(kind), count)
    if name not in found.column_names:
        return pa.nulls(count, kind)
    column = found[name]
    return column if column.type.equals(kind) else column.cast(kind)


def _positions(table: pa.Table, condition: str, file: str, section: str) -> np.ndarray:
    """Positions of the rows for which the condition is true, int64, ascending."""
    used = table.select(filter_columns(condition, table.schema))
    if not len(table):
        return np.zeros(0, np.int64)
    used = used.append_column(_POSITION, pa.array(np.arange(len(table))))
    try:
        with _connect() as connection:
            kept = connection.from_arrow(used).filter(condition).project(_POSITION).fetchnumpy()
    except duckdb.Error as error:
        raise SplitError(
            f"{section}.filter {condition!r} fails on rows of {file}: {_first_line(error)}"
        ) from error
    return np.sort(np.asarray(kept[_POSITION], np.int64))


def _connect() -> Any:
    """A session of this process's one database; opening a database anew takes as long as a small split."""
    return _database().cursor()


@lru_cache
def _database() -> Any:
    """A database in memory that can neither reach files nor this process's variables."""
    config: dict[str, Any] = {
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "threads": 1,
    }
    return duckdb.connect(":memory:", config=config)


def filter_columns(filter: str, schema: pa.Schema) -> list[str]:
    """A superset of the columns that a condition names: those whose name occurs in its text."""
    text = filter.lower().replace('""', '"')
    return [name for name in schema.names if name.lower() in text]


def filter_faults(filter: str, schema: pa.Schema) -> list[str]:
    """What is wrong with a SQL condition on these columns, one sentence each; empty where it is fine."""
    shown = f"input.filter {filter!r}"
    known = ", ".join(schema.names)
    used = pa.schema([schema.field(name) for name in filter_columns(filter, schema)])
    table = used.append(pa.field(_POSITION, pa.int64())).empty_table()
    try:
        with _connect() as connection:
            rows = connection.from_arrow(table)
            rows.filter(filter).fetchall()
            (kind,) = rows.project(f"({filter}\n)").types
    except duckdb.Error as error:
        return [f"{shown} is not a SQL condition on the input: {_first_line(error)} (columns: {known})"]
    if str(kind) != "BOOLEAN":
        return [
            f"{shown} is a {kind}, not true or false; compare it with something, such as {filter.strip()} = …"
        ]
    called = {name.lower() for name in re.findall(r"([A-Za-z_]\w*)\s*\(", filter)} & _volatile()
    if called:
        names = ", ".join(sorted(called))
        return [
            f"{shown} calls {names}, which gives another answer on each rerun; use a condition on columns"
        ]
    return []


@lru_cache
def _volatile() -> frozenset[str]:
    """Names of the SQL functions whose answer differs from call to call."""
    with _connect() as connection:
        found = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
        )
        return frozenset(name.lower() for (name,) in found.fetchall())


def _first_line(error: duckdb.Error) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
