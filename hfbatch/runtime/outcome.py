"""What the steps of a runner give."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from hfbatch.output.rejects import Reject
from hfbatch.runtime.predictor import Prediction


@dataclass
class Predicted:
    """What the model gives for features."""

    outputs: pa.Table
    """One row for each that has a prediction, in input order, with the column POSITION."""
    rejects: list[Reject]
    stats: Prediction
    """Tokens and batches."""


@dataclass
class Outcome:
    """What became of the rows of a table."""

    positions: np.ndarray
    """Of the rows that have a prediction, int64 in input order."""
    columns: dict[str, pa.Array]
    """The task's output columns of these rows."""
    rejects: list[Reject]
    """Of the other rows, in input order."""
    cut: np.ndarray
    """Which rows were truncated, bool [rows]."""
    lengths: np.ndarray
    """Length of each row, see `Task.lengths`, int64 [rows]; 0 for those without features."""
    stats: Prediction
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each step: load, preprocess, predict, postprocess."""
