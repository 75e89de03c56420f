"""Rows with identical features: they run through the model once. Does not import torch.

What a model computes for a row depends on its features alone. Rows that are sampled have different seeds among them, so that
these are never identical.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.runtime.predictor import Prediction
from hfbatch.tasks.tokens import list_lengths


def distinct(features: pa.Table) -> tuple[np.ndarray, np.ndarray] | None:
    """Finds identical rows, bit for bit.

    :returns: positions of the first row of each kind, int64 in input order, and the place of each row's kind among them,
        int64 [rows]; None if all rows differ, or have features that are not compared, such as nested lists.
    """
    if not len(features):
        return None
    kinds = np.zeros(len(features), np.int64)
    for column in features.columns:
        codes = _codes(column.combine_chunks())
        if codes is None:
            return None
        _, kinds = np.unique(kinds * (codes.max(initial=0) + 1) + codes, return_inverse=True)
        if kinds.max(initial=0) + 1 == len(kinds):
            return None
    _, first, place = np.unique(kinds, return_index=True, return_inverse=True)
    order = np.argsort(first)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return first[order], back[place]


def repeat(made: Prediction, place: np.ndarray) -> Prediction:
    """The results of all rows, from those of one row of each kind. :param place: see `distinct`."""
    index = np.full(place.max(initial=-1) + 1, -1, np.int64)
    index[made.kept] = np.arange(len(made.kept))
    found = index[place]
    kept = np.flatnonzero(found >= 0)
    errors = dict(made.failures)
    return replace(
        made,
        outputs=made.outputs.take(pa.array(found[kept])),
        kept=kept,
        failures=[(row, errors[kind]) for row, kind in enumerate(place.tolist()) if kind in errors],
        repeated=len(place) - len(index),
    )


def _codes(array: pa.Array) -> np.ndarray | None:
    """A number for each row, int64, the same for the same bits; None for types that are not compared."""
    kind = array.type
    if array.null_count:
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if not _plain(kind.value_type) or array.flatten().null_count:
            return None
        values, width = array.flatten(), kind.value_type.bit_width // 8
        ends = np.cumsum(_lengths(array)) * width
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        data = values.buffers()[1].slice(values.offset * width) if len(values) else pa.py_buffer(b"")
        array = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(array), [None, pa.py_buffer(offsets), data]
        )
    elif _plain(kind):
        array = array.view(f"int{kind.bit_width}")
    elif not (_text(kind) or pa.types.is_boolean(kind)):
        return None
    return pc.dictionary_encode(array).indices.to_numpy().astype(np.int64)


def _text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _plain(kind: pa.DataType) -> bool:
    """Whether a type has whole bytes of numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _lengths(array: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return list_lengths(array)
