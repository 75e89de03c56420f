"""Evaluation: every row of the features once, whatever the number of processes. Knows nothing of Trainer and of Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hfbatch.compute.batching import by_length, cut
from hfbatch.errors import WorkerError
from hfbatch.train.details import summary
from hfbatch.train.recipes.base import Predicted, Recipe
from hfbatch.train.rows import FeatureRows

NO_NUMBERS = (
    "lower schedule.learning_rate, or set compute.dtype=float32. The checkpoints before it are untouched"
)
"""What to do when training has come to infinities."""
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
    """Metrics and the mean loss, the same in every process.

    Batches of similar lengths go round the processes. Each runs equally many, since a sharded model computes
    in step; what a process runs beyond the last batch is thrown away.

    :param collate: numbers of rows to a batch.
    :param size: rows of a batch.
    :param details: where the first process writes what single rows say, as JSON.
    :raises WorkerError: if a row was scored twice or not at all, or the loss is no number.
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
    """Metrics from what all processes predicted, worked out in the first."""
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
        except Exception as error:  # noqa: BLE001 - the others wait for an answer
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
        raise WorkerError(f"the loss of the rows to measure with is {loss}; {NO_NUMBERS}")
    return {"loss": loss, **recipe.score(ordered, table)}
