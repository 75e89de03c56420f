"""What tasks share in which a model reads texts whole, in padded batches. Knows nothing of what it makes of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Batch, Task
from hfbatch.tasks.parts.text import (
    collate_text,
    flatten,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
)


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
        return padding_id(self.tokenizer, self.config)

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

    def set_pad_id(self, model: Any) -> None:
        """Tells a causal classifier the padding id, which it finds a row's last token by, where its config does not."""
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.pad_id
