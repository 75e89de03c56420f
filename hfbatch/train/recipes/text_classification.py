"""Training text-classification: one label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.tasks.tokens import text_column
from hfbatch.train.recipes.labels import LABEL, LabelRecipe

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.text.text_classification import TextClassification


class TextClassificationRecipe(LabelRecipe):
    """Trains text classification."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    columns = (text_column("text"), text_column("text_pair", required=False), LABEL)
    in_both = ("text_pair",)
    task: TextClassification

    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """Finds texts that are null or empty, and second texts of pairs that are null."""
        empty = pc.equal(pc.utf8_length(columns["text"].cast(pa.string())), 0).fill_null(True)
        found = {"text is null or empty": empty}
        if "text_pair" in columns:
            found["text_pair is null"] = pc.is_null(columns["text_pair"])
        return {fault: rows.to_numpy(zero_copy_only=False) for fault, rows in found.items()}

    def config_changes(self) -> dict[str, Any]:
        """Returns the labels, and the padding id by which decoder models find the last token."""
        return {**super().config_changes(), "pad_token_id": self.task.pad_id}

    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Returns the padded tokens."""
        import torch

        batch = self.task.collate(features, np.arange(len(features)), 1)
        return {name: torch.from_numpy(value) for name, value in batch.items()}
