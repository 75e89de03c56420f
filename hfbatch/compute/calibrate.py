"""Chooses the batch size by trying a few on real rows."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from hfbatch.compute.batching import by_length, cut
from hfbatch.compute.predictor import padded_size
from hfbatch.engines.base import Engine
from hfbatch.tasks.base import Task

SAMPLE_ROWS = 96
"""Rows that each size is timed on, but at least LEAST_BATCHES batches."""
LEAST_BATCHES = 3
GAIN = 1.1
"""How much faster than the size before it a larger one has to be: it needs more memory and pads more."""


def choose_batch_size(task: Task, engine: Engine, features: pa.Table) -> int:
    """The largest of `engine.batch_sizes` that fits and that it pays to go to.

    Sizes are tried from small to large on batches like those of the job, spread over the rows sorted by
    length, until one is hardly faster or memory is full.

    :param features: rows of one split.
    """
    order = by_length(task.lengths(features))
    sizes = [size for size in engine.batch_sizes if size < 2 * len(order)] or [engine.batch_sizes[0]]
    chosen, best = sizes[0], 0.0
    _run(task, engine, features, order[len(order) // 2 :][: sizes[0]])
    for size in sizes:
        try:
            rate = _rate(task, engine, features, order, size)
        except Exception as error:
            if not engine.is_out_of_memory(error):
                raise
            engine.release_memory()
            break
        if rate < GAIN * best:
            break
        chosen, best = size, rate
    return chosen


def _rate(task: Task, engine: Engine, features: pa.Table, order: np.ndarray, size: int) -> float:
    """Useful tokens per second: what the device computes, less the padding that all rows would have.

    The median of the batches, so that one that the machine held up does not decide.
    """
    batches = max(SAMPLE_ROWS // size, LEAST_BATCHES)
    starts = np.linspace(0, max(len(order) - size, 0), batches + 2)[1:-1].astype(int)
    speeds = []
    for start in starts:
        begun = time.perf_counter()
        computed = _run(task, engine, features, order[start : start + size])
        speeds.append(computed / (time.perf_counter() - begun))
    lengths = task.lengths(features)[order]
    bounds = cut(lengths, size, None, engine.pad_multiple)
    padded = sum(int(lengths[start]) * (stop - start) for start, stop in bounds)
    return float(np.median(speeds) * lengths.sum() / max(padded, 1))


def _run(task: Task, engine: Engine, features: pa.Table, rows: np.ndarray) -> int:
    """Runs one batch; returns the tokens that it computes, padding included."""
    batch = task.collate(features, rows, engine.pad_multiple)
    engine.collect(engine.submit(batch, task.probe))
    return padded_size(batch)
