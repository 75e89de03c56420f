"""Chooses the batch size by trying a few on real rows."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.compute.batching import alignment, by_length, cut, padded_width
from hfbatch.compute.windows import unfold
from hfbatch.engines.base import DeviceLostError, Engine
from hfbatch.tasks.base import Task

SAMPLE_ROWS = 96
"""Rows that each size is timed on, but at least as many batches as the engine has under way, and two."""
TRIES = 2
"""Of which the faster counts: what else the machine does can only slow a trial down."""
GAIN = 1.08
"""How much faster than the size before it a larger one has to be: it needs more memory and pads more, and on a
machine that others use too, trials of one size differ by as much."""
MOST_SECONDS = 10
"""What all trials together may take: where rows are slow, the device is better kept busy with the job."""


def choose_batch_size(task: Task, engine: Engine, features: pa.Table) -> int:
    """The largest of `engine.batch_sizes` that fits and that it pays to go to.

    Sizes are tried from small to large on batches like those of the job, spread over the rows sorted by
    length, until one is hardly faster, memory is full or time is up. Rows so slow that there is no time to
    compare two sizes get the smallest one. So do those on which the trial fails: what is wrong with which row, and
    what fits, the job itself finds out.

    :param features: rows of one split.
    :raises DeviceLostError: when the process has to be given up.
    """
    features = unfold(task, features).table
    order = by_length(task.lengths(features))
    sizes = [size for size in engine.batch_sizes if size < 2 * len(order)] or [engine.batch_sizes[0]]
    chosen, best = sizes[0], 0.0
    try:
        affordable = _affordable(task, engine, features, order[len(order) // 2 :][: sizes[0]], sizes)
        for size in affordable if len(affordable) > 1 else []:
            rate = max(_rate(task, engine, features, order, size) for _ in range(TRIES))
            if rate < GAIN * best:
                break
            chosen, best = size, rate
    except DeviceLostError:
        raise
    except Exception:  # noqa: BLE001 - see above
        engine.release_memory()
    return chosen


def _affordable(
    task: Task, engine: Engine, features: pa.Table, rows: np.ndarray, sizes: list[int]
) -> list[int]:
    """The sizes, from the first on, whose trials fit into MOST_SECONDS, going by the time of one batch.

    :param rows: of that batch.
    """
    _run(task, engine, features, [rows])  # what a first call sets up does not count
    begun = time.perf_counter()
    _run(task, engine, features, [rows])
    seconds = (time.perf_counter() - begun) / len(rows)
    costs = np.cumsum([TRIES * _batches(engine, size) * size for size in sizes]) * seconds
    return [size for size, cost in zip(sizes, costs, strict=True) if cost <= MOST_SECONDS]


def _batches(engine: Engine, size: int) -> int:
    """Batches of a trial."""
    return max(SAMPLE_ROWS // size, engine.depth, 2)


def _rate(task: Task, engine: Engine, features: pa.Table, order: np.ndarray, size: int) -> float:
    """Useful tokens per second: what the device computes, less the padding that all rows would have."""
    batches = _batches(engine, size)
    starts = np.linspace(0, max(len(order) - size, 0), batches + 2)[1:-1].astype(int)
    begun = time.perf_counter()
    computed = _run(task, engine, features, [order[start : start + size] for start in starts])
    speed = computed / (time.perf_counter() - begun)
    lengths = task.lengths(features)[order]
    bounds = cut(lengths, size, None, engine.pad_multiple)
    widths = (padded_width(int(lengths[start]), engine.pad_multiple) for start, _ in bounds)
    padded = sum(width * (stop - start) for width, (start, stop) in zip(widths, bounds, strict=True))
    return speed * float(lengths.sum()) / max(padded, 1)


def _run(task: Task, engine: Engine, features: pa.Table, batches: list[np.ndarray]) -> int:
    """Runs batches as the job does; returns the tokens that they cost, padding included."""
    engine.expect(len(batches))
    computed, pending, lengths = 0, deque[Any](), task.lengths(features)
    for rows in batches:
        batch = task.collate(features, rows, alignment(int(lengths[rows].max()), engine.pad_multiple))
        computed += task.padded_size(batch)
        pending.append(engine.submit(batch, task.probe))
        if len(pending) >= engine.depth:
            engine.collect(pending.popleft())
    while pending:
        engine.collect(pending.popleft())
    return computed
