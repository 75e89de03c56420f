"""Per-row results of an evaluation, as few plain values that are saved with its checkpoint."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.data.filesystem import READ_ERRORS
from hfbatch.train.data.rows import ROW
from hfbatch.train.loop.checkpoints import Checkpoints
from hfbatch.train.recipes.base import Recipe

DETAILS = "details.json"
"""Name of the file in a checkpoint."""
MOST_WORST = 20
"""Number of rows with the highest loss that are kept."""
MOST_LABELS = 200
"""Maximum number of labels with which the confusion matrix is kept."""


def summary(recipe: Recipe, predictions: list[Any], features: pa.Table) -> dict[str, Any]:
    """Reduces the details of an evaluation to those that a report shows.

    :param predictions: one for each row of the features, in their order.
    :returns: `confusion` (`labels`, and `counts` by true and predicted label; None if there is none) and `worst`:
        `row`, `loss`, `guess` and `truth` of the rows with the highest loss, descending. A row with several features
        has the highest loss of these.
    """
    found = recipe.details(predictions, features)
    losses, rows = np.array(found.get("losses", [])), features[ROW].to_numpy()
    guesses, truths = found.get("guesses"), found.get("truths")
    worst: dict[int, dict[str, Any]] = {}
    for place in np.argsort(-losses, kind="stable").tolist():
        if len(worst) == MOST_WORST:
            break
        row = int(rows[place])
        guess, truth = (column[place] if column else None for column in (guesses, truths))
        worst.setdefault(row, {"row": row, "loss": float(losses[place]), "guess": guess, "truth": truth})
    confusion = found.get("confusion")
    if confusion and len(confusion["labels"]) > MOST_LABELS:
        confusion = None
    return {"confusion": confusion, "worst": list(worst.values())}


def read_details(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Reads the details of a checkpoint; empty if it has none."""
    try:
        with checkpoints.fs.open_input_stream(f"{checkpoints.path(step)}/{DETAILS}") as stream:
            return json.loads(stream.read())
    except READ_ERRORS:
        return {}
