"""What tasks share in which a model reads texts whole, in padded batches. Knows nothing of what it makes of them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Batch, Task
from hfbatch.tasks.parts.heads import logits_of_last
from hfbatch.tasks.parts.positions import model_padding
from hfbatch.tasks.parts.text import (
    collate_text,
    flatten,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
    run_text,
)

if TYPE_CHECKING:
    import torch


class EncoderTask(Task):
    """Base of tasks whose rows are tokens, or windows of tokens."""

    whole_texts = True

    @cached_property
    def limit(self) -> int | None:
        """Most tokens of what the model reads at a time."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def pad_id(self) -> int:
        """The id of padding tokens."""
        return padding_id(self.tokenizer, self.config, self.vocabulary)

    def check(self) -> list[str]:
        """The fault of a length beyond the model's."""
        return length_faults(self.max_length, self.tokenizer, self.config)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Tokens of each row, in all of its windows, or of each window apart."""
        lists = flatten(features["input_ids"])
        if not pa.types.is_list(lists.type.value_type):
            return list_lengths(lists)
        ends = np.concatenate([[0], np.cumsum(list_lengths(lists.flatten()))])
        return np.diff(ends[np.concatenate([[0], np.cumsum(list_lengths(lists))])])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Token ids padded on the right."""
        return collate_text(features, rows, self.pad_id, multiple, limit=self.limit, full_mask=False)

    def classify(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of each row, [batch, labels].

        A causal classifier finds a row's last token by the padding id of its config. Where that has none which a
        batch can be padded with, any token may be a row's own, and the mask tells the last one.
        """
        if model_padding(self.config, self.vocabulary) is not None:
            return run_text(model, batch).logits
        return logits_of_last(model, batch, self.pad_id)
