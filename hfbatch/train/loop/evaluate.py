"""Evaluation of every row of the features exactly once, on any number of processes. Does not import Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hfbatch.errors import WorkerError
from hfbatch.runtime.batching import by_length, cut
from hfbatch.train.data.rows import FeatureRows
from hfbatch.train.loop.per_example import summary
from hfbatch.train.recipes.base import Predicted, Recipe

NO_NUMBERS = "lower schedule.learning_rate, or set compute.dtype=float32. Earlier checkpoints are kept"
"""Advice for a training whose loss or weights are not finite."""
Collate = Callable[[list[int]], dict[str, torch.Tensor]]


def evaluate(
    recipe: Recipe,
    model: Any,
    rows: FeatureRows,
    collate: Collate,
    size: int,
    device: torch.device,
    details: Path | None = None,
) -> dict[str, float]:
    """Computes the metrics and the mean loss; every process returns the same.

    Batches of similar lengths are distributed round-robin. All processes run the same number of batches, since
    sharded models need this; the results of surplus batches are discarded.

    :param collate: makes a batch of row numbers.
    :param size: rows of a batch.
    :param details: file to which the first process writes per-row details as JSON.
    :raises WorkerError: if a row was scored twice or not at all, or the loss is NaN.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = by_length(rows.lengths)
    batches = [order[start:stop].tolist() for start, stop in cut(rows.lengths[order], size)]
    numbers: list[int] = []
    mine: list[Predicted] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for turn in range(0, len(batches), world):
            real = turn + rank < len(batches)
            batch = batches[turn + rank if real else -1]
            inputs = {name: value.to(device) for name, value in collate(batch).items()}
            predicted = recipe.predict(model, inputs)
            if real:
                numbers += batch
                mine.append(predicted)
    model.train(was_training)
    return _together(recipe, rows, numbers, mine, rank, world, details)


def _together(
    recipe: Recipe,
    rows: FeatureRows,
    numbers: list[int],
    mine: list[Predicted],
    rank: int,
    world: int,
    details: Path | None,
) -> dict[str, float]:
    """Gathers the predictions of all processes, and computes the metrics in the first one."""
    predictions = [one for batch in mine for one in batch.predictions]
    share = (numbers, predictions, sum(one.loss for one in mine), sum(one.items for one in mine))
    shares: list[Any] = [share]
    if world > 1:
        shares = [None] * world
        dist.gather_object(share, shares if rank == 0 else None)
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [_score(recipe, rows, shares, details)]
        except Exception as error:  # noqa: BLE001 - the other processes wait for an answer
            answer = [error]
    if world > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def _score(recipe: Recipe, rows: FeatureRows, shares: list[Any], details: Path | None) -> dict[str, float]:
    numbers = np.array([number for share in shares for number in share[0]], np.int64)
    back = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[back], np.arange(len(rows))):
        raise WorkerError(f"evaluation scored {len(numbers)} rows of {len(rows)}, some twice or not at all")
    predictions = [one for share in shares for one in share[1]]
    ordered = [predictions[place] for place in back.tolist()]
    table = rows.table(recipe.scored)
    if details is not None:
        details.write_text(json.dumps(summary(recipe, ordered, table)), encoding="utf8")
    items = sum(share[3] for share in shares)
    loss = sum(share[2] for share in shares) / items if items else float("nan")
    if items and np.isnan(loss):
        raise WorkerError(f"the loss of the evaluation set is {loss}; {NO_NUMBERS}")
    return {"loss": loss, **recipe.score(ordered, table)}
