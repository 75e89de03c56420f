"""Chooses the batch size by trying a few on real rows."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from hfbatch.compute.batching import by_length, cut
from hfbatch.compute.predictor import padded_size
from hfbatch.engines.base import Engine
from hfbatch.tasks.base import Task

SAMPLE_ROWS = 128
"""Rows that each size is timed on; larger sizes take two batches."""
CLOSE = 0.97
"""A smaller size this close to the fastest is kept: it needs less memory and varies less."""
FALLING = 0.9
"""A rate this far below the best ends the search."""


def choose_batch_size(task: Task, engine: Engine, features: pa.Table) -> int:
    """The batch size that is fastest, or close to it, and fits; from `engine.batch_sizes`.

    Sizes are tried from small to large on batches like those of the job, spread over the rows sorted by
    length, until the rate falls or memory is full.

    :param features: rows of one split.
    """
    order = by_length(task.lengths(features))
    sizes = [size for size in engine.batch_sizes if size < 2 * len(order)] or [engine.batch_sizes[0]]
    rates: dict[int, float] = {}
    _run(task, engine, features, order[len(order) // 2 :][: sizes[0]])
    for size in sizes:
        try:
            rates[size] = _rate(task, engine, features, order, size)
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            engine.release_memory()
            break
        if rates[size] < FALLING * max(rates.values()):
            break
    enough = CLOSE * max(rates.values(), default=0.0)
    return next((size for size, rate in rates.items() if rate >= enough), sizes[0])


def _rate(task: Task, engine: Engine, features: pa.Table, order: np.ndarray, size: int) -> float:
    """Useful tokens per second: what the device computes, less the padding that all rows would have."""
    batches = max(SAMPLE_ROWS // size, 2)
    starts = np.linspace(0, max(len(order) - size, 0), batches + 2)[1:-1].astype(int)
    begun = time.perf_counter()
    computed = sum(_run(task, engine, features, order[start : start + size]) for start in starts)
    speed = computed / (time.perf_counter() - begun)
    lengths = task.lengths(features)[order]
    bounds = cut(lengths, size, None, engine.pad_multiple)
    padded = sum(int(lengths[start]) * (stop - start) for start, stop in bounds)
    return speed * float(lengths.sum()) / max(padded, 1)


def _run(task: Task, engine: Engine, features: pa.Table, rows: np.ndarray) -> int:
    """Runs one batch; returns the tokens that it computes, padding included."""
    batch = task.collate(features, rows, engine.pad_multiple)
    engine.collect(engine.submit(batch, task.probe))
    return padded_size(batch)
