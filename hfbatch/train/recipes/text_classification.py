"""Training text-classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.tasks.parts.text import text_column
from hfbatch.train.recipes.parts.labels import LABEL, LabelRecipe

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.text_classification import TextClassification


class TextClassificationRecipe(LabelRecipe):
    """Learns the labels of texts."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    columns = (text_column("text"), text_column("text_pair", required=False), LABEL)
    in_both = ("text_pair",)
    task: TextClassification

    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """A text that is null or empty, or the second one of a pair that is null."""
        empty = pc.equal(pc.utf8_length(columns["text"].cast(pa.string())), 0).fill_null(True)
        found = {"text is null or empty": empty}
        if "text_pair" in columns:
            found["text_pair is null"] = pc.is_null(columns["text_pair"])
        return {fault: rows.to_numpy(zero_copy_only=False) for fault, rows in found.items()}

    def config_changes(self) -> dict[str, Any]:
        """Labels, and the padding that models look for the last token with."""
        return {**super().config_changes(), "pad_token_id": self.task.pad_id}

    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Padded tokens."""
        import torch

        batch = self.task.collate(features, np.arange(len(features)), 1)
        return {name: torch.from_numpy(value) for name, value in batch.items()}
