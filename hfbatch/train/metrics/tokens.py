"""Metrics of models that predict tokens, computed from sums over rows, so that no logits are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_metrics(sums: Sequence[np.ndarray]) -> dict[str, float]:
    """Computes perplexity and accuracy; every token has the same weight.

    :param sums: float [3] for each row: negative log-likelihood of its tokens, their number, and how many were the
        most probable ones.
    :returns: perplexity, e to the mean negative log-likelihood; accuracy. Both are nan if there are no tokens.
    """
    loss, tokens, correct = np.stack(sums).astype(np.float64).sum(axis=0).tolist()
    if not tokens:
        return {"perplexity": float("nan"), "accuracy": float("nan")}
    return {"perplexity": float(np.exp(loss / tokens)), "accuracy": correct / tokens}
