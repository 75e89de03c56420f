"""Splits rows into windows, their model inputs, before batching, and joins the results after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Task
from hfbatch.tasks.tokens import flatten, list_lengths, lists_of


@dataclass(frozen=True)
class Windows:
    """The windows of a split."""

    table: pa.Table
    """One row per window: features as collate takes them."""
    row: np.ndarray
    """The row of the features that each window belongs to, int64 [windows], not decreasing."""
    lengths: np.ndarray
    """Length of each window, see `Task.lengths`."""

    def rows_begun(self, places: np.ndarray) -> int:
        """Counts the rows whose first window is at one of these places, so that batches count each row once."""
        return int((np.diff(self.row, prepend=-1) > 0)[places].sum())


def unfold(task: Task, features: pa.Table) -> Windows:
    """Returns the windows of each row, in order; for tasks without windows, the rows.

    :raises ValueError: for a row without windows.
    """
    names = _present(task.windows, features)
    if not names:
        return Windows(features, np.arange(len(features)), task.lengths(features))
    counts = list_lengths(features[names[0]])
    if len(counts) and counts.min() == 0:
        raise ValueError(f"task {task.name} made a row without windows")
    table = pa.table({name: flatten(features[name]).flatten() for name in names})
    return Windows(table, np.repeat(np.arange(len(features)), counts), task.lengths(table))


def fold(outputs: pa.Table, row: np.ndarray) -> pa.Table:
    """Groups columns of windows into lists, one per row that has a window.

    :param row: the row of each window, int64 [windows], not decreasing.
    """
    counts = np.unique(row, return_counts=True)[1]
    lists = [lists_of(flatten(column), counts) for column in outputs.columns]
    return pa.table(lists, names=outputs.column_names)


def carry(task: Task, outputs: pa.Table, features: pa.Table, rows: np.ndarray) -> pa.Table:
    """Appends the carried features, which postprocess reads, to the outputs.

    :param rows: the position in features of each row of outputs, int64.
    """
    for name in _present(task.carried, features):
        outputs = outputs.append_column(name, features[name].take(pa.array(rows)))
    return outputs


def _present(names: Sequence[str], features: pa.Table) -> list[str]:
    return [name for name in names if name in features.column_names]
