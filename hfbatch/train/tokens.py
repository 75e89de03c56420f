"""What recipes share that learn tokens: loss and metrics over all of them, and small predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.train.metrics.tokens import token_metrics
from hfbatch.train.recipes.base import IGNORED, Predicted, Recipe

if TYPE_CHECKING:
    import torch


class TokenRecipe(Recipe):
    """Base of recipes whose labels are the tokens of a vocabulary."""

    @property
    def metric(self) -> str:
        """The mean negative log-likelihood, whose exponential is the perplexity."""
        return "loss"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those over all tokens."""
        return "perplexity", "accuracy"

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """What the logits of each place are compared with, int64 [batch, width]."""
        return labels

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of every token that is learnt, as in `Recipe`."""
        return super().loss(outputs, self.targets(labels), num_items_in_batch)

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Of each row, float64 [3]: its negative log-likelihood, its tokens, how many of them were the likeliest.

        The loss is without label smoothing, so that perplexity is its exponential.
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
        """Perplexity and accuracy over all tokens that are learnt."""
        return token_metrics(predictions)

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """The mean loss of each row's tokens."""
        return {"losses": [float(loss / max(tokens, 1)) for loss, tokens, _ in predictions]}
