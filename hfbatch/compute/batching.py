"""Batches: order by length, cut, and back to the input order. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa


def by_length(lengths: np.ndarray) -> np.ndarray:
    """Row positions from longest to shortest, ties in input order: int64 [rows].

    Longest first, so that a batch that does not fit shows at once.
    """
    return np.argsort(-lengths, kind="stable")


def alignment(longest: int, multiple: int) -> int:
    """What the length of a batch is rounded up to a multiple of: `multiple`, a power of 2, which the device likes.

    Above 8, half of it will do as often as the whole would add more than an eighth.
    """
    while multiple > 8 and (-longest % multiple) * 8 > longest:
        multiple //= 2
    return multiple


def padded_width(longest: int, multiple: int) -> int:
    """The length of a batch with its padding, at least 1. :param multiple: see `alignment`."""
    multiple = alignment(longest, multiple)
    return max(-(-longest // multiple) * multiple, 1)


def cut(
    lengths: np.ndarray, size: int, tokens: int | None = None, multiple: int = 1, alike: bool = False
) -> list[tuple[int, int]]:
    """Cuts rows sorted from longest to shortest into batches.

    :param lengths: int64 [rows], not increasing.
    :param size: most rows of a batch.
    :param tokens: most tokens of a batch with its padding; a row longer than that is a batch of its own.
    :param multiple: see `alignment`.
    :param alike: put rows of one length alone into a batch.
    :returns: (start, stop) of each batch.
    """
    bounds, start = [], 0
    while start < len(lengths):
        rows = size
        if tokens is not None:
            rows = min(size, max(tokens // padded_width(int(lengths[start]), multiple), 1))
        if alike:
            rows = min(rows, int(np.searchsorted(-lengths, -lengths[start], side="right")) - start)
        bounds.append((start, min(start + rows, len(lengths))))
        start += rows
    return bounds


def to_arrow(outputs: Mapping[str, np.ndarray], ragged: Mapping[str, str]) -> pa.Table:
    """One batch's results as Arrow columns.

    [batch] becomes a plain column, [batch, n] a fixed-size list, and a ragged [batch, width] or [batch, width, n]
    a list cut to the lengths that `ragged` names. A list of bytes, one for each row, becomes a binary column.
    """
    columns: dict[str, pa.Array] = {}
    for name, array in outputs.items():
        if isinstance(array, list):
            columns[name] = pa.array(array, pa.large_binary())
        elif name in ragged:
            lengths = outputs[ragged[name]]
            inside = np.arange(array.shape[1])[None, :] < lengths[:, None]
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets), _flat(array[inside]))
        else:
            columns[name] = _flat(array if array.ndim == 1 else array.reshape(len(array), -1))
    return pa.table(columns)


def _flat(array: np.ndarray) -> pa.Array:
    """[rows] as a plain column, [rows, n] as fixed-size lists."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])
