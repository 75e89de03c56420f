"""Reads one split: its columns and filter. Needs only plain values, and lists no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.filesystem import READ_ERRORS, one_line, open_filesystem, redact, stat_file
from hfbatch.data.filter import filter_columns, filter_faults, matching_rows
from hfbatch.data.formats import FORMATS
from hfbatch.data.formats.base import BadRow, Parsed, Piece, Wanted
from hfbatch.data.formats.columns import convert, empty_table
from hfbatch.data.formats.lines import misfit
from hfbatch.data.formats.rowgroups import MOST_BYTES
from hfbatch.data.formats.texttypes import convert as convert_text
from hfbatch.data.formats.texttypes import fits
from hfbatch.data.listing import partition_keys
from hfbatch.data.rendering import RenderedColumn, render_column
from hfbatch.data.splits import Split
from hfbatch.errors import SplitError

__all__ = ["PLACES", "ReadPlan", "Rows", "filter_columns", "filter_faults", "read_split"]

PLACES = pa.schema([("file", pa.string()), ("row", pa.int64())])


@dataclass(frozen=True)
class ReadPlan:
    """The description of an input with which a worker reads any split."""

    path: str
    """The folder of the relative file names, as a URL or absolute path."""
    format: str
    """Its name in FORMATS."""
    columns: tuple[str, ...]
    """Columns to read, including those of the filter."""
    schema: pa.Schema
    """Their types, the same in every split."""
    hive: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Columns from `key=value` folders."""
    filter: str | None = None
    """A SQL condition; rows for which it is not true are dropped."""
    section: str = "input"
    """The section of the spec with the input, for errors."""
    given: frozenset[str] = frozenset()
    """Columns whose type the spec gives."""
    whole: bool = False
    """Whether to report JSONL columns that are not in `columns`."""
    rendered: RenderedColumn | None = None
    """A column that is rendered from `columns` and follows them."""


@dataclass
class Rows:
    """The rows of a split."""

    table: pa.Table
    """The columns of `ReadPlan.columns`, in that order and with those types, and the rendered one."""
    places: pa.Table
    """The origin of each row: `file` (string) and `row` (int64)."""
    read: int
    """Rows before the filter."""
    bad: list[BadRow] = field(default_factory=list)
    """Rows that cannot be read, whatever the filter, or not be rendered; with their positions in the table."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Columns that are not in the plan, with the number of rows in which they hold a value."""


def read_split(split: Split, plan: ReadPlan) -> Rows:
    """Reads the rows of a split in input order, applies the filter and renders the templates.

    :raises SplitError: if a file is missing, changed or unreadable, or its rows differ from the split's.
    """
    rows = _read(split, plan)
    if plan.rendered:
        column, bad = render_column(plan.rendered, rows.table, {row.position for row in rows.bad})
        rows.table = rows.table.append_column(plan.rendered.name, column)
        rows.bad += bad
    return rows


def _read(split: Split, plan: ReadPlan) -> Rows:
    if split.fault is not None:
        raise SplitError(split.fault)
    fs, root = open_filesystem(plan.path)
    pieces: list[Parsed] = []
    left = MOST_BYTES
    for piece in split.pieces:
        left -= (piece.stop - piece.start) * (len(piece.file) + 16)  # the origins of the rows
        pieces.append(_read_piece(fs, root, piece, plan, left))
        left -= pieces[-1].table.nbytes
    table = pa.concat_tables([empty_table(plan.schema), *(piece.table for piece in pieces)])
    places = pa.concat_tables([PLACES.empty_table(), *(_places(piece) for piece in split.pieces)])
    firsts = np.cumsum([0, *(len(piece.table) for piece in pieces)]).tolist()
    bad = [
        replace(row, position=first + row.position)
        for first, piece in zip(firsts, pieces, strict=False)
        for row in piece.bad
    ]
    unplanned = Counter[str]()
    for parsed in pieces:
        unplanned.update(parsed.unplanned)
    if not plan.filter:
        return Rows(table, places, split.rows, bad, dict(unplanned))
    found = np.array([row.position for row in bad], np.int64)
    kept = np.union1d(matching_rows(table, plan.filter, split.pieces[0].file, plan.section), found)
    bad = [replace(row, position=int(np.searchsorted(kept, row.position))) for row in bad]
    return Rows(table.take(kept), places.take(kept), split.rows, bad, dict(unplanned))


def _places(piece: Piece) -> pa.Table:
    count = piece.stop - piece.start
    return pa.table(
        [pa.repeat(pa.scalar(piece.file), count), pa.array(np.arange(piece.start, piece.stop))], PLACES
    )


def _read_piece(fs: pafs.FileSystem, root: str, piece: Piece, plan: ReadPlan, most: int) -> Parsed:
    path = f"{root}/{piece.file}"
    count = piece.stop - piece.start
    try:
        _check_unchanged(fs, path, piece, plan)
        names = [name for name in plan.columns if name not in plan.hive]
        schema = pa.schema([plan.schema.field(name) for name in names])
        wanted = Wanted(schema, plan.given & set(names), plan.whole, plan.section)
        found = FORMATS[plan.format].load().read(fs, path, piece, wanted, most)
        keys = partition_keys(piece.file)
        columns = [_column(name, found.table, keys, count, plan) for name in plan.columns]
        bad = _bad_partitions(keys, count, plan) or found.bad
        return Parsed(pa.Table.from_arrays(columns, schema=plan.schema), bad, found.unplanned)
    except READ_ERRORS as error:
        raise SplitError(
            f"{piece.file} (rows {piece.start}-{piece.stop}) cannot be read: {one_line(error)}"
        ) from error


def _bad_partitions(keys: Mapping[str, str | None], count: int, plan: ReadPlan) -> list[BadRow]:
    """Returns all rows of a file as bad rows if one of its `key=value` folders does not fit the type of its column."""
    for name, kind in plan.hive.items():
        value = keys.get(name)
        if value is not None and not fits(value, kind, exact=name not in plan.given):
            message = misfit(name, kind, f"{value!r} in the name of its folder", plan.section)
            return [BadRow(position, "Misfit", message) for position in range(count)]
    return []


def _check_unchanged(fs: pafs.FileSystem, path: str, piece: Piece, plan: ReadPlan) -> None:
    now = stat_file(fs, path)
    if now is None:
        raise SplitError(
            f"{piece.file} is gone from {redact(plan.path)}; restore it, or run again without it"
        )
    size, mtime_ns = now
    # Some filesystems give the time only in a listing: 0 is unknown.
    if size != piece.size or (mtime_ns and piece.mtime_ns and mtime_ns != piece.mtime_ns):
        raise SplitError(f"{piece.file} changed while the job ran; run again")


def _column(
    name: str, found: pa.Table, keys: Mapping[str, str | None], count: int, plan: ReadPlan
) -> pa.Array | pa.ChunkedArray:
    kind = plan.schema.field(name).type
    if name in plan.hive:
        values, _ = convert_text(pa.array([keys.get(name)], pa.string()), kind, exact=name not in plan.given)
        return pa.repeat(values[0], count)
    if name not in found.column_names:
        return pa.nulls(count, kind)
    column = found[name]
    return convert(column, kind)
