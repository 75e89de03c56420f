"""Reads rows of Parquet row groups up to a limit of decoded bytes.

A file of 100 kB may decode to gigabytes, if a value in a dictionary is used on every row. The footer gives the number
of values, not their lengths. So a row group that could become too large is read in batches, which are small enough
for the longest value of each dictionary, up to the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hfbatch.data.formats.columns import convert

MOST_BYTES = 2 << 30
"""Most decoded bytes of the rows of a split. One column of Arrow's plain strings or bytes cannot hold more."""
BATCH_BYTES = 256 << 20
SMALL_BYTES, FEW_BATCHES = 16 << 20, 256
"""Reading dictionaries takes time in proportion to their size, which may be that of all values; if it is not small
and few batches suffice for the longest possible value, batches cost less."""
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8}
EACH = 5
"""Bytes per value in addition to its content: offset and null bit."""

Opener = Callable[..., pq.ParquetFile]


def read_rows(
    file: pq.ParquetFile,
    again: Opener,
    groups: Sequence[int],
    skipped: int,
    count: int,
    schema: pa.Schema,
    most: int = MOST_BYTES,
) -> pa.Table:
    """Reads some rows of consecutive row groups.

    :param again: opens the same file with other options of pq.ParquetFile.
    :param skipped: rows of the groups before the first wanted one; count: wanted rows.
    :param schema: columns to read, with the plain types of dictionaries and views.
    :param most: most decoded bytes.
    :raises ValueError: if there are more.
    """
    sizes = {group: _most_bytes(file, again, group, schema.names, most) for group in groups}
    if sum(sizes.values()) <= most:
        return _decoded(file.read_row_groups(groups, columns=schema.names).slice(skipped, count), schema)
    parts, held, seen, stop = [], 0, 0, skipped + count
    for group, size in sizes.items():
        rows = file.metadata.row_group(group).num_rows
        if seen + rows <= skipped or seen >= stop:
            seen += rows
            continue
        batch = max(min(rows * BATCH_BYTES // max(size, 1), 1 << 16), 1)
        for some in file.iter_batches(batch, row_groups=[group], columns=schema.names):
            first, last = max(skipped - seen, 0), min(stop - seen, len(some))
            seen += len(some)
            if last > first:
                parts.append(_decoded(pa.Table.from_batches([some.slice(first, last - first)]), schema))
                held += parts[-1].nbytes
            if held > most:
                raise ValueError(
                    f"its rows decode to more than the {MOST_BYTES:,} bytes that a split may have; lower split_rows "
                    "beside the path in the spec, or write the file in smaller row groups"
                )
            if seen >= stop:
                break
    return pa.concat_tables(parts)


def _decoded(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns the columns of a schema with dictionaries and views decoded, which takes the bytes counted."""
    table = table.select(schema.names)  # for `s.t`, pyarrow also returns field `t` of a struct `s`
    for at, column in enumerate(table.columns):
        kind = schema.field(table.column_names[at]).type
        if _is_short(column.type) and column.type != kind:
            table = table.set_column(at, table.column_names[at], convert(column, kind))
    return table


def _is_short(kind: pa.DataType) -> bool:
    """Returns whether values of a type, or of a nested type, may share their bytes."""
    tests = (pa.types.is_dictionary, pa.types.is_string_view, pa.types.is_binary_view)
    inner = (kind.field(at).type for at in range(kind.num_fields))
    return any(test(kind) for test in tests) or any(map(_is_short, inner))


def _most_bytes(file: pq.ParquetFile, again: Opener, group: int, names: Sequence[str], enough: int) -> int:
    """Returns the most decoded bytes of columns of a group: by its footer, and by its dictionaries if necessary."""
    found, known = file.metadata.row_group(group), 0
    repeated = {}
    for at in range(found.num_columns):
        chunk = found.column(at)
        path, values = chunk.path_in_schema, chunk.num_values
        if not any(path == name or path.startswith(f"{name}.") for name in names):
            continue
        known += values * EACH
        if chunk.physical_type == "BYTE_ARRAY":
            known += chunk.total_uncompressed_size
            if chunk.has_dictionary_page:
                repeated[path] = values, chunk.total_uncompressed_size
        else:
            known += values * (WIDTHS.get(chunk.physical_type) or file.schema.column(at).length)
    guess = sum(values * size for values, size in repeated.values())
    few = guess <= FEW_BATCHES * BATCH_BYTES and sum(size for _, size in repeated.values()) > SMALL_BYTES
    if known + guess <= enough or few:
        return known + guess
    longest = _longest(again, group, list(repeated))
    return known + sum(values * longest.get(path, size) for path, (values, size) in repeated.items())


def _longest(again: Opener, group: int, paths: list[str]) -> dict[str, int]:
    """Returns the bytes of the longest value in each dictionary of a group that can be read as a dictionary."""
    found = {}
    for path in paths:
        try:
            with again(read_dictionary=[path], pre_buffer=False, buffer_size=1 << 16) as file:
                row = next(file.iter_batches(1, row_groups=[group], columns=[path]))
            found[path] = max(map(_longest_in, row.columns))
        except (pa.ArrowException, NotImplementedError, StopIteration, ValueError):
            continue
    return found


def _longest_in(array: Any) -> int:
    """Returns the bytes of the longest value in the dictionaries of an array. :raises ValueError: if it has none."""
    if pa.types.is_dictionary(array.type):
        return pc.max(pc.binary_length(array.dictionary)).as_py() or 0
    if pa.types.is_struct(array.type):
        return max(map(_longest_in, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_map(array.type):
        return _longest_in(array.values)
    raise ValueError(f"{array.type} holds no dictionary")
