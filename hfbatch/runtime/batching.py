"""Sorts rows by length, splits them into batches, and converts results to Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa


def by_length(lengths: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Returns row positions from longest to shortest, ties in input order: int64 [rows].

    Longest first, so that a batch that does not fit into memory fails at the start.

    :param groups: int64 [rows]; rows of a group follow each other, the group with the longest row first.
    """
    if groups is None:
        return np.argsort(-lengths, kind="stable")
    longest = np.zeros(int(groups.max(initial=0)) + 1, np.int64)
    np.maximum.at(longest, groups, lengths)
    return np.lexsort((-lengths, groups, -longest[groups]))


def alignment(longest: int, multiple: int) -> int:
    """Returns the alignment of a batch's length: `multiple`, a power of 2 that suits the device, or a fraction of it.

    Above 8, the alignment is halved while it would add more than an eighth of padding.
    """
    while multiple > 8 and (-longest % multiple) * 8 > longest:
        multiple //= 2
    return multiple


def padded_width(longest: int, multiple: int) -> int:
    """Returns the padded length of a batch, at least 1. :param multiple: see `alignment`."""
    multiple = alignment(longest, multiple)
    return max(-(-longest // multiple) * multiple, 1)


def cut(
    lengths: np.ndarray, size: int, tokens: int | None = None, multiple: int = 1, alike: bool = False
) -> list[tuple[int, int]]:
    """Splits rows sorted from longest to shortest into batches.

    :param lengths: int64 [rows], not increasing.
    :param size: maximum of rows in a batch.
    :param tokens: maximum of tokens in a batch, padding included; a longer row is a batch by itself.
    :param multiple: see `alignment`.
    :param alike: put only rows of equal length into a batch.
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


def cut_groups(groups: np.ndarray | None, lengths: np.ndarray, *options: Any) -> list[tuple[int, int]]:
    """Splits rows sorted by `by_length` into batches, each of rows of one group; see `cut`.

    :param groups: of the sorted rows.
    """
    if groups is None:
        return cut(lengths, *options)
    ends = [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    starts = [0, *ends[:-1]]
    return [
        (first + start, first + stop)
        for first, last in zip(starts, ends, strict=True)
        for start, stop in cut(lengths[first:last], *options)
    ]


def to_arrow(outputs: Mapping[str, np.ndarray], ragged: Mapping[str, str]) -> pa.Table:
    """Converts the results of a batch to Arrow columns.

    [batch] becomes a plain column, [batch, n] a fixed-size list, and a ragged [batch, width] or [batch, width, n]
    a list truncated to the lengths that `ragged` names. A list of bytes, one per row, becomes a binary column.
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
    """Converts [rows] to a plain column, [rows, n] to fixed-size lists."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).ravel()), array.shape[1])
