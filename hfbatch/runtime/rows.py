"""The inference loop over a row engine: takes the features of a split, returns outputs in input order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import DeviceLostError, RowEngine
from hfbatch.errors import WorkerError
from hfbatch.runtime.batching import by_length, to_arrow
from hfbatch.runtime.isolate import isolate
from hfbatch.runtime.predictor import BatchStats, Prediction, finite_rows
from hfbatch.runtime.windows import carry
from hfbatch.tasks.base import Task
from hfbatch.tasks.completing import CompletingTask


class RowPredictor:
    """Gives the rows of a split to a row engine; if it fails, runs those without a result again, in smaller calls.

    :param task: also a CompletingTask.
    :param rows: maximum of concurrent rows.
    :param tokens: maximum of tokens in a step of the model.
    :param on_batch: called after each row.
    """

    def __init__(
        self,
        task: Task,
        engine: RowEngine,
        rows: int,
        tokens: int | None = None,
        on_batch: Callable[[BatchStats], None] | None = None,
    ) -> None:
        self.task, self.engine = task, engine
        self.rows, self.tokens = rows, tokens
        self._on_batch = on_batch or (lambda stats: None)

    def predict(self, features: pa.Table) -> Prediction:
        """Runs every row once.

        :raises DeviceLostError: if the process must be replaced.
        :raises WorkerError: if the engine could not answer any row.
        """
        asking = cast(CompletingTask, self.task)
        requests, lengths = asking.requests(features), self.task.lengths(features)
        order = by_length(lengths, self.task.batch_groups(features, self.rows, caches=True))
        done: dict[int, Any] = {}
        failed: dict[int, Exception] = {}
        result = Prediction(pa.table({}), np.empty(0, np.int64))

        def run(rows: np.ndarray) -> None:
            """Continues the rows that have no result yet."""
            left = [row for row in rows.tolist() if row not in done and row not in failed]
            begun = time.perf_counter()
            try:
                for place, made in self.engine.complete(
                    [requests[row] for row in left],
                    asking.decoding,
                    self.rows,
                    self.tokens,
                    getattr(asking.params, "log_probs", False),
                ):
                    if isinstance(made, Exception):
                        failed[left[place]] = made
                        continue
                    done[left[place]] = made
                    now = time.perf_counter()
                    length = int(lengths[left[place]])
                    self._on_batch(BatchStats(1, length, length, now - begun))
                    begun = now
            except Exception as error:
                if self.engine.is_out_of_memory(error):
                    self.engine.release_memory()
                raise
            result.batches += bool(left)

        _, result.failures = isolate(run, order, fatal=(DeviceLostError, WorkerError))
        result.failures += failed.items()
        result.usage = self.engine.take_usage()
        result.kept = np.array(sorted(done), np.int64)
        counted = result.usage.get("prompt_tokens", int(lengths[result.kept].sum()))
        result.tokens = result.padded_tokens = counted
        if not done:
            return result
        kept = result.kept.tolist()
        outputs = asking.outputs_of([requests[row] for row in kept], [done[row] for row in kept])
        result.outputs = to_arrow(outputs, self.task.ragged)
        if self.task.finite:
            result = finite_rows(result, self.engine.dtype)
        result.outputs = carry(self.task, result.outputs, features, result.kept)
        return result
