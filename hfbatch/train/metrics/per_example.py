"""Per-row details besides the metrics: losses, predictions, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def label_details(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Returns details for one label per row, in the format of `Recipe.details`.

    :param logits: float [rows, classes].
    :param labels: class indices, int [rows].
    """
    from scipy.special import log_softmax
    from sklearn.metrics import confusion_matrix

    guess = logits.argmax(axis=1)
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    counts = confusion_matrix(labels, guess, labels=np.arange(len(names)))
    return {
        "losses": losses.tolist(),
        "guesses": [names[place] for place in guess],
        "truths": [names[place] for place in labels],
        "confusion": {"labels": list(names), "counts": counts.tolist()},
    }


def labels_details(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Returns details for any number of labels per row; a label is predicted if its logit is above 0.

    :param logits: float [rows, classes].
    :param labels: 0 or 1, [rows, classes].
    """
    signed = np.where(labels > 0.5, logits, -logits).astype(np.float64)
    return {
        "losses": np.logaddexp(0, -signed).mean(axis=1).tolist(),
        "guesses": [_joined(row, names) for row in logits > 0],
        "truths": [_joined(row, names) for row in labels > 0.5],
    }


def number_details(guess: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Returns details for one number per row, float [rows] both; the loss is the squared error."""
    return {
        "losses": np.square(guess.astype(np.float64) - truth).tolist(),
        "guesses": [f"{value:.4g}" for value in guess],
        "truths": [f"{value:.4g}" for value in truth],
    }


def _joined(chosen: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(names[place] for place in np.flatnonzero(chosen).tolist()) or "none"
