"""Metrics of labels and of numbers, by sklearn and SciPy."""

from __future__ import annotations

import warnings

import numpy as np

METRICS = {
    "single": (
        "accuracy", "mcc", "f1_macro", "precision_macro", "recall_macro", "f1_weighted", "precision_weighted",
        "recall_weighted", "roc_auc",
    ),
    "multi": (
        "accuracy", "f1_micro", "precision_micro", "recall_micro", "f1_macro", "precision_macro", "recall_macro",
        "roc_auc",
    ),
    "regression": ("pearson", "spearman", "mse", "mae"),
}  # fmt: skip
"""Names of the metrics by kind of label."""


def single_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes metrics for one label per row.

    :param logits: float [rows, classes].
    :param labels: class indices, int [rows].
    :returns: accuracy; f1, precision and recall, macro and weighted; mcc; roc_auc (one-vs-rest), if all classes occur
        in the rows.
    """
    from sklearn import metrics

    guess = logits.argmax(axis=1)
    found = {
        "accuracy": metrics.accuracy_score(labels, guess),
        "mcc": metrics.matthews_corrcoef(labels, guess),
    }
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            labels, guess, average=average, zero_division=0
        )
        found |= {f"f1_{average}": f1, f"precision_{average}": precision, f"recall_{average}": recall}
    if len(np.unique(labels)) == logits.shape[1]:
        power = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
        shares = power / power.sum(axis=1, keepdims=True)
        scores = shares[:, 1] if logits.shape[1] == 2 else shares
        found["roc_auc"] = metrics.roc_auc_score(labels, scores, multi_class="ovr")
    return {name: float(value) for name, value in found.items()}


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes metrics for any number of labels per row; a label is predicted if its logit is above 0.

    :param logits: float [rows, classes].
    :param labels: 0 or 1, [rows, classes].
    :returns: accuracy (of whole rows); f1, precision and recall, micro and macro; roc_auc, macro over the classes
        that some but not all rows have.
    """
    from sklearn import metrics

    guess, truth = logits > 0, labels > 0.5
    found = {"accuracy": metrics.accuracy_score(truth, guess)}
    for average in ("micro", "macro"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            truth, guess, average=average, zero_division=0
        )
        found |= {f"f1_{average}": f1, f"precision_{average}": precision, f"recall_{average}": recall}
    mixed = truth.any(axis=0) & ~truth.all(axis=0)
    if mixed.any():
        found["roc_auc"] = metrics.roc_auc_score(truth[:, mixed], logits[:, mixed], average="macro")
    return {name: float(value) for name, value in found.items()}


def regression(guess: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Computes regression metrics, float [rows] both.

    :returns: pearson and spearman correlation (0 if one side is constant), mse, mae.
    """
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        pearson, spearman = (
            float(measure(guess, truth).statistic) if len(truth) > 1 else 0.0
            for measure in (stats.pearsonr, stats.spearmanr)
        )
    return {
        "pearson": 0.0 if np.isnan(pearson) else pearson,
        "spearman": 0.0 if np.isnan(spearman) else spearman,
        "mse": float(np.mean((guess - truth) ** 2)),
        "mae": float(np.mean(np.abs(guess - truth))),
    }
