"""Base class of recipes that predict tokens: loss and metrics over all tokens, as sums per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.train.metrics.tokens import token_metrics
from hfbatch.train.recipes.base import IGNORED, Predicted, Recipe

if TYPE_CHECKING:
    import torch


class TokenRecipe(Recipe):
    """Base class of recipes whose labels are tokens of a vocabulary."""

    @property
    def metric(self) -> str:
        """The mean negative log-likelihood, whose exponential is the perplexity."""
        return "loss"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics over all tokens."""
        return "perplexity", "accuracy"

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the target of the logits at each position, int64 [batch, width]."""
        return labels

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes the cross-entropy over all target tokens, as in `Recipe`."""
        return super().loss(outputs, self.targets(labels), num_items_in_batch)

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Returns for each row, float64 [3]: negative log-likelihood, number of tokens, and how many were predicted.

        A token counts as predicted if it is the most probable one. The loss is without label smoothing, so that
        perplexity is its exponential.
        """
        from torch import stack
        from torch.nn.functional import cross_entropy

        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets, logits = self.targets(batch["labels"]), model(**inputs).logits.float()
        each = cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        sums = stack([each.sum(1), targets.ne(IGNORED).sum(1), logits.argmax(-1).eq(targets).sum(1)], 1)
        rows = sums.cpu().double().numpy()
        loss, items, _ = rows.sum(axis=0)
        return Predicted(list(rows), float(loss), int(items))

    def score(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, float]:
        """Computes perplexity and accuracy over all target tokens."""
        return token_metrics(predictions)

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """Returns the mean loss of each row's tokens."""
        return {"losses": [float(loss / max(tokens, 1)) for loss, tokens, _ in predictions]}
