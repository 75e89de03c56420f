"""The inference loop: takes the features of a split, returns outputs in input order. Does not import Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.data.finite import non_finite
from hfbatch.engines.base import CACHED, BatchEngine, DeviceLostError, Forward
from hfbatch.errors import NonFiniteOutput, WorkerError
from hfbatch.runtime.batching import alignment, by_length, cut_groups, to_arrow
from hfbatch.runtime.isolate import isolate
from hfbatch.runtime.windows import Windows, carry, fold, unfold
from hfbatch.tasks.base import FINITE, Batch, Task
from hfbatch.tasks.generation.prefix import PREFIX

Follow = Callable[[np.ndarray, list[int]], None]
"""Takes positions of rows, int64 [batch], and the token that each text of theirs has got in a step, in this order."""
FATAL = DeviceLostError, WorkerError
"""Errors that no row causes."""


@dataclass
class BatchStats:
    """Size and duration of one batch."""

    rows: int
    """Rows whose first window is in the batch."""
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass
class Prediction:
    """Results of a split."""

    outputs: pa.Table
    """One row per successful row, in input order."""
    kept: np.ndarray
    """Positions of the successful rows in the features, int64."""
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    """Positions of rows for which the model raised or returned non-finite numbers, with the error."""
    tokens: int = 0
    padded_tokens: int = 0
    batches: int = 0
    repeated: int = 0
    """Rows that got the result of an identical row."""
    usage: dict[str, int] = field(default_factory=dict)
    """What is counted besides: CACHED, and what `RowEngine.take_usage` returns."""


class Predictor:
    """Runs rows in batches; isolates failing rows and halves batches that do not fit into memory.

    :param size: maximum of rows in a batch.
    :param tokens: maximum of tokens in a batch, see `batching.cut`.
    :param on_batch: called after each batch.
    """

    def __init__(
        self,
        task: Task,
        engine: BatchEngine,
        size: int,
        tokens: int | None = None,
        on_batch: Callable[[BatchStats], None] | None = None,
    ) -> None:
        self.task, self.engine = task, engine
        self.size, self.tokens = size, tokens
        self.multiple = engine.pad_multiple if task.pads else 1
        self._on_batch = on_batch or (lambda stats: None)

    def predict(self, features: pa.Table, follow: Follow | None = None, spread: bool = False) -> Prediction:
        """Runs every row once.

        :param follow: called while texts are generated, by tasks that have `follow`.
        :param spread: whether few rows are divided among the batches that the engine computes at the same time.
        :raises DeviceLostError: if the process must be replaced.
        :raises WorkerError: if the engine cannot run the model.
        """
        windows = unfold(self.task, features)
        size = min(self.size, max(-(-len(windows.table) // self.engine.parallel), 1)) if spread else self.size
        groups = self.task.batch_groups(windows.table, size)
        order = by_length(windows.lengths, groups)
        result = Prediction(pa.table({}), np.empty(0, np.int64))
        done: list[tuple[np.ndarray, pa.Table]] = []
        again: list[np.ndarray] = []
        pending: deque[tuple[np.ndarray, dict[str, np.ndarray], Any, float]] = deque()

        def finish() -> None:
            """Collects the oldest batch in flight."""
            rows, batch, handle, begun = pending.popleft()
            with self._failures_to(again, rows):
                done.append((rows, to_arrow(self.engine.collect(handle), self.task.ragged)))
                self._count(rows, batch, windows, begun, result)

        sorted_groups = None if groups is None else groups[order]
        options = size, self.tokens, self.multiple, not self.task.pads
        bounds = cut_groups(sorted_groups, windows.lengths[order], *options)
        self.engine.expect(max(len(bounds), 1))
        for start, stop in bounds:
            rows = order[start:stop]
            begun = time.perf_counter()
            with self._failures_to(again, rows):
                batch = self._collate(windows, rows)
                forward = self._forward(rows, follow)
                pending.append((rows, batch, self.engine.submit(batch, forward), begun))
            while len(pending) >= self.engine.depth:
                finish()
        while pending:
            finish()
        for rows in again:  # after all other batches have released their memory
            self._retry(windows, rows, done, result)
        result = _in_input_order(result, done)
        if self.task.finite:
            result = finite_rows(result, self.engine.dtype)
        if self.task.windows:
            result = _whole_rows(result, windows.row)
        result.outputs = carry(self.task, result.outputs, features, result.kept)
        return result

    def _forward(self, rows: np.ndarray, follow: Follow | None) -> Forward:
        following = getattr(self.task, "follow", None)
        if follow is None or following is None:
            return self.task.forward
        return partial(following, on_tokens=partial(follow, rows))

    def _collate(self, windows: Windows, rows: np.ndarray) -> Batch:
        multiple = alignment(int(windows.lengths[rows].max(initial=0)), self.multiple)
        return self.task.collate(windows.table, rows, multiple)

    @contextmanager
    def _failures_to(self, again: list[np.ndarray], rows: np.ndarray) -> Iterator[None]:
        """Records the rows of a batch that fails inside the context, to be rerun in smaller batches."""
        try:
            yield
        except FATAL:
            raise
        except Exception as error:  # noqa: BLE001 - the failing row is found by running it alone
            if self.engine.is_out_of_memory(error):
                self.engine.release_memory()
            again.append(rows)

    def _retry(
        self,
        windows: Windows,
        rows: np.ndarray,
        done: list[tuple[np.ndarray, pa.Table]],
        result: Prediction,
    ) -> None:
        """Halves a failed batch until it fits, or until the failing row is alone."""

        def run(rows: np.ndarray) -> pa.Table:
            """Runs rows as one batch."""
            begun = time.perf_counter()
            batch = self._collate(windows, rows)
            try:
                outputs = self.engine.collect(self.engine.submit(batch, self.task.forward))
            except Exception as error:
                if self.engine.is_out_of_memory(error):
                    self.engine.release_memory()
                raise
            self._count(rows, batch, windows, begun, result)
            return to_arrow(outputs, self.task.ragged)

        outputs, failures = isolate(run, rows, fatal=FATAL)
        done.extend(outputs)
        result.failures.extend(failures)

    def _count(
        self,
        rows: np.ndarray,
        batch: dict[str, np.ndarray],
        windows: Windows,
        begun: float,
        result: Prediction,
    ) -> None:
        tokens = int(windows.lengths[rows].sum())
        padded = tokens if self.engine.packs else self.task.padded_size(batch)
        result.tokens += tokens
        result.padded_tokens += padded
        result.batches += 1
        if shared := int(batch.get(PREFIX, 0)) * (len(rows) - 1):
            result.usage[CACHED] = result.usage.get(CACHED, 0) + shared
        self._on_batch(BatchStats(windows.rows_begun(rows), tokens, padded, time.perf_counter() - begun))


def _in_input_order(result: Prediction, done: list[tuple[np.ndarray, pa.Table]]) -> Prediction:
    if done:
        rows = np.concatenate([rows for rows, _ in done])
        back = np.argsort(rows, kind="stable")
        result.kept = rows[back]
        result.outputs = (
            pa.concat_tables([outputs for _, outputs in done]).combine_chunks().take(pa.array(back))
        )
    return result


def finite_rows(result: Prediction, dtype: str) -> Prediction:
    """Moves rows with NaN or infinity in the outputs to the failures. :param dtype: the model's dtype."""
    outputs = result.outputs
    found: dict[int, str] = {}
    if FINITE in outputs.column_names:
        fine = outputs[FINITE].to_numpy()
        found = dict.fromkeys(np.flatnonzero(~fine).tolist(), "what the model computed")
        outputs = outputs.drop_columns([FINITE])
    for name in outputs.column_names:
        for place in non_finite(outputs[name]).tolist():
            found.setdefault(place, f"{name!r} of the model's outputs")
    result.outputs = outputs
    if found:
        result.failures += [
            (int(result.kept[place]), NonFiniteOutput.of(what, dtype)) for place, what in found.items()
        ]
        kept = np.setdiff1d(np.arange(len(outputs)), list(found))
        result.outputs, result.kept = outputs.take(pa.array(kept)), result.kept[kept]
    return result


def _whole_rows(result: Prediction, row: np.ndarray) -> Prediction:
    """Joins windows into rows; a row fails with the error of its first failed window.

    :param row: the row of each window, int64 [windows].
    """
    failed: dict[int, Exception] = {}
    for window, error in result.failures:
        failed.setdefault(int(row[window]), error)
    whole = ~np.isin(row[result.kept], list(failed))
    rows = row[result.kept][whole]
    result.outputs = fold(result.outputs.filter(pa.array(whole)), rows)
    result.kept, result.failures = np.unique(rows), list(failed.items())
    return result
