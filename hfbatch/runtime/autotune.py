"""Chooses the batch size by trying a few on real rows."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import BatchEngine, DeviceLostError
from hfbatch.runtime.batching import alignment, by_length, cut, padded_width
from hfbatch.runtime.windows import unfold
from hfbatch.tasks.base import Task

WARM_UP_ROWS = 2
"""Rows of the first batch, which is not timed."""
LEAST_BATCHES, MOST_BATCHES = 2, 32
"""Limits of the number of batches in a trial; more than the first if the engine runs more at the same time."""
TRIAL_SECONDS = 0.2
"""Time of a trial, which is long against the differences between two runs of the same batches."""
TRIES = 2
"""Trials of each size, of which the fastest counts: other load on the machine can only slow a trial down."""
GAIN = 1.05
"""Required speedup over a smaller size: a larger size needs more memory and padding, and on a shared machine, trials of the
same size differ by as much."""
MOST_SECONDS = 10
"""Time limit of all trials together: where rows are slow, the device time is better spent on the job."""
MOST_SHARE = 0.05
"""Limit of all trials together as a share of the job's estimated time on one worker."""
LEAST_SECONDS = 0.5
"""Trials that take less than this are made in short jobs too."""


def choose_batch_size(task: Task, engine: BatchEngine, features: pa.Table, rows: int) -> int:
    """Returns the smallest of `engine.batch_sizes` that is about as fast as the fastest of those that fit into memory.

    All sizes are tried in turn, on batches like those of the job, spread over the rows sorted by length, until time is up.
    Returns the smallest size if the job is too short or its rows too slow to compare two sizes in time, or if a trial of it
    fails: the job itself finds invalid rows and splits batches that do not fit.

    :param features: rows of one split.
    :param rows: rows of the job.
    :raises DeviceLostError: if the process must be replaced.
    """
    features = unfold(task, features).table
    order = by_length(task.lengths(features))
    sizes = [size for size in engine.batch_sizes if size < 2 * len(order)] or [engine.batch_sizes[0]]
    rates: dict[int, float] = {}
    try:
        first = order[len(order) // 2 :][: sizes[0]]
        each = _seconds_each(task, engine, features, first)
    except DeviceLostError:
        raise
    except Exception:  # noqa: BLE001 - see above
        engine.release_memory()
        return sizes[0]
    affordable = _affordable(engine, sizes, each, rows)
    for _ in range(TRIES if len(affordable) > 1 else 0):
        for size in affordable:
            try:
                rate = _rate(task, engine, features, order, size, _batches(engine, size, each))
            except DeviceLostError:
                raise
            except Exception:  # noqa: BLE001 - memory is full: larger sizes do not fit either
                engine.release_memory()
                affordable = [one for one in affordable if one < size]
                break
            rates[size] = max(rate, rates.get(size, 0.0))
    tried = [size for size in affordable if size in rates]
    fastest = max((rates[size] for size in tried), default=0.0)
    return next((size for size in tried if rates[size] * GAIN >= fastest), sizes[0])


def _seconds_each(task: Task, engine: BatchEngine, features: pa.Table, batch: np.ndarray) -> float:
    """Returns the seconds of a row, from the time of one batch. :param batch: rows of that batch."""
    _run(task, engine, features, [batch[:WARM_UP_ROWS]])
    begun = time.perf_counter()
    _run(task, engine, features, [batch])
    return (time.perf_counter() - begun) / len(batch)


def _affordable(engine: BatchEngine, sizes: list[int], each: float, rows: int) -> list[int]:
    """Returns the sizes whose trials fit into the time limits. :param each: seconds of a row."""
    limit = min(max(MOST_SHARE * each * rows, LEAST_SECONDS), MOST_SECONDS)
    costs = np.cumsum([TRIES * _batches(engine, size, each) * size for size in sizes]) * each
    return [size for size, cost in zip(sizes, costs, strict=True) if cost <= limit]


def _batches(engine: BatchEngine, size: int, each: float) -> int:
    """Returns the number of batches in a trial."""
    wanted = int(TRIAL_SECONDS / (each * size))
    return max(min(wanted, MOST_BATCHES), engine.parallel, LEAST_BATCHES)


def _rate(
    task: Task, engine: BatchEngine, features: pa.Table, order: np.ndarray, size: int, batches: int
) -> float:
    """Returns tokens per second, excluding the share of padding that this size causes over all rows."""
    starts = np.linspace(0, max(len(order) - size, 0), batches + 2)[1:-1].astype(int)
    begun = time.perf_counter()
    computed = _run(task, engine, features, [order[start : start + size] for start in starts])
    speed = computed / (time.perf_counter() - begun)
    lengths = task.lengths(features)[order]
    bounds = cut(lengths, size, None, engine.pad_multiple)
    widths = (padded_width(int(lengths[start]), engine.pad_multiple) for start, _ in bounds)
    padded = sum(width * (stop - start) for width, (start, stop) in zip(widths, bounds, strict=True))
    return speed * float(lengths.sum()) / max(padded, 1)


def _run(task: Task, engine: BatchEngine, features: pa.Table, batches: list[np.ndarray]) -> int:
    """Runs batches as the job does; returns their number of tokens, padding included."""
    engine.expect(len(batches))
    computed, pending, lengths = 0, deque[Any](), task.lengths(features)
    for rows in batches:
        batch = task.collate(features, rows, alignment(int(lengths[rows].max()), engine.pad_multiple))
        computed += task.padded_size(batch)
        pending.append(engine.submit(batch, task.trial_forward))
        if len(pending) >= engine.depth:
            engine.collect(pending.popleft())
    while pending:
        engine.collect(pending.popleft())
    return computed
