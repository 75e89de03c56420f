"""Chooses the held-out evaluation set by a hash of the rows' contents, so that equal rows stay together.

The choice does not depend on splits or workers. Does not import Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

CHOICE = "by what rows hold, the same rows together"
"""Part of a training's identity: another way to choose gives another evaluation set."""
MOST_HASHES = 4_000_000
"""Maximum number of hashes that are compared; of more rows, a sample that contains all repeats of its rows."""


def row_hashes(columns: Mapping[str, pa.Array]) -> np.ndarray:
    """Hashes each row over all columns, uint64 [rows]: equal for equal values."""
    leaves = [leaf for column in columns.values() for leaf in _leaves(column)]
    table = pa.table(leaves, [f"c{number}" for number in range(len(leaves))])
    digests = [
        f"coalesce(md5({_bytes(leaf.type, name)}), '-')"
        for name, leaf in zip(table.column_names, leaves, strict=True)
    ]
    with _database().cursor() as connection:
        hashes = connection.from_arrow(table).project(
            f"md5_number_lower(concat({', '.join(digests)})) AS hash"
        )
        return np.asarray(hashes.fetchnumpy()["hash"], np.uint64)


def is_aside(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns which rows are held out, bool [rows].

    :param hashes: returned by `row_hashes`.
    :param fraction: the share of the distinct rows to hold out.
    """
    state = hashes + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)  # SplitMix64; its sums wrap around
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) / 2**64 < fraction


def compared(hashes: np.ndarray, rows: int) -> np.ndarray:
    """Selects the hashes in which repeats are counted. :param rows: number of rows of all splits."""
    return hashes[hashes % np.uint64(_part(rows)) == 0]


def repeat_notes(kept: Sequence[np.ndarray], rows: int) -> list[str]:
    """Returns a note on the number of duplicate rows; empty if there are none.

    :param kept: returned by `compared`, for all rows from which the evaluation set is held out.
    :param rows: number of rows of all splits, as for `compared`.
    """
    hashes = np.concatenate([np.zeros(0, np.uint64), *kept])
    repeats, part = len(hashes) - len(np.unique(hashes)), _part(rows)
    if not repeats:
        return []
    about = "" if part == 1 else "about "
    return [
        f"{about}{repeats * part:,} rows are duplicates of another row; all copies of a row are either in the training "
        "or in the evaluation set"
    ]


def _part(rows: int) -> int:
    return max(-(-rows // MOST_HASHES), 1)


def _leaves(column: pa.Array) -> Iterator[pa.Array]:
    """Yields the column, or the fields of its structs, in types that DuckDB reads; lists of numbers as bytes."""
    kind = column.type
    if pa.types.is_struct(kind):
        for field in column.flatten():
            yield from _leaves(field)
    elif pa.types.is_fixed_size_list(kind):
        yield from _leaves(column.cast(pa.list_(kind.value_type)))
    elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type):
        yield _packed(column)
    else:
        yield column.cast(pa.float32()) if pa.types.is_float16(kind) else column


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _packed(lists: pa.Array) -> pa.Array:
    """Views lists of numbers as bytes without a copy; lists with nulls are left to be cast to text, which is slow."""
    values = lists.values
    if values.null_count:
        plain = pa.float32() if pa.types.is_float16(values.type) else values.type
        return lists.cast(pa.list_(plain))
    width = values.type.bit_width // 8
    ends = pa.array(lists.offsets.to_numpy().astype(np.int64) * width).buffers()[1]
    data = values.buffers()[1].slice(values.offset * width)
    valid = None if not lists.null_count else lists.is_valid().buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), len(lists), [valid, ends, data])


def _bytes(kind: pa.DataType, name: str) -> str:
    """Returns the SQL of a value as bytes or text."""
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return name if plain else f"CAST({name} AS VARCHAR)"


@lru_cache
def _database() -> Any:
    config: dict[str, Any] = {
        "threads": 1,
        "enable_external_access": "false",
        "python_enable_replacements": "false",
    }
    return duckdb.connect(":memory:", config=config)
