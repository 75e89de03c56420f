"""Metrics of models that predict tokens, from sums over rows: no logits are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_metrics(sums: Sequence[np.ndarray]) -> dict[str, float]:
    """Every token counts the same, whichever row it is of.

    :param sums: of each row, float [3]: negative log-likelihood of its tokens, their number, how many were the likeliest.
    :returns: perplexity, e to the mean negative log-likelihood; accuracy. Both nan where there is no token at all.
    """
    loss, tokens, correct = np.stack(sums).astype(np.float64).sum(axis=0).tolist()
    if not tokens:
        return {"perplexity": float("nan"), "accuracy": float("nan")}
    return {"perplexity": float(np.exp(loss / tokens)), "accuracy": correct / tokens}
