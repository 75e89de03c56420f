"""Finds NaN and infinity in Arrow columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NONE = np.empty(0, np.int64)


def non_finite(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns the rows of a column that hold NaN or infinity, at any depth of lists and structs: int64, increasing.

    Nulls count as finite. If all numbers are finite, they are read once.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return non_finite(column.storage)
    if pa.types.is_floating(kind):
        finite = np.isfinite((column.fill_null(0) if column.null_count else column).to_numpy())
        return NONE if finite.all() else np.flatnonzero(~finite)
    if pa.types.is_struct(kind):
        found = [non_finite(field) for field in column.flatten()]
        return np.unique(np.concatenate([NONE, *found]))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inside = non_finite(column.flatten())
        if not len(inside):
            return NONE
        ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        return np.unique(np.searchsorted(ends, inside, side="right"))
    return NONE
