"""Base class of tasks that run an encoder on padded batches of texts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import Capability
from hfbatch.tasks.base import Batch, Task
from hfbatch.tasks.positions import model_padding
from hfbatch.tasks.text.heads import logits_of_last
from hfbatch.tasks.tokens import (
    collate_text,
    length_faults,
    length_limit,
    padding_id,
    run_text,
    token_counts,
)

if TYPE_CHECKING:
    import torch


ENCODER_OF = ("t5", "mt5", "umt5")
"""Encoder-decoder models whose encoder alone computes embeddings."""


class EncoderTask(Task):
    """Base class of tasks whose rows are tokens, or windows of tokens."""

    whole_texts = True

    @cached_property
    def limit(self) -> int | None:
        """Maximum number of tokens in one model input."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def pad_id(self) -> int:
        """The padding token id."""
        return padding_id(self.tokenizer, self.config, self.vocabulary)

    def check(self) -> list[str]:
        """Returns an error if the length limit exceeds the model's."""
        return length_faults(self.max_length, self.tokenizer, self.config)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens in each row, over all of its windows, or in each single window."""
        return token_counts(features["input_ids"])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns token ids padded on the right."""
        return collate_text(features, rows, self.pad_id, multiple, limit=self.limit, full_mask=False)

    @property
    def asks(self) -> frozenset[Capability]:
        """Also the module of a causal model whose config has no padding id, see `classify`."""
        known = model_padding(self.config, self.vocabulary) is not None
        return super().asks if known else super().asks | {Capability.MODULE}

    def classify(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits of each row, [batch, labels].

        A causal classifier finds a row's last token by the padding id of its config. If the config has no usable
        padding id, the attention mask determines the last token.
        """
        if model_padding(self.config, self.vocabulary) is not None:
            return run_text(model, batch).logits
        return logits_of_last(model, batch, self.pad_id)
