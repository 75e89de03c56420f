"""Task feature-extraction: a vector for each token of a text. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Batch, Example, Features, Histogram, Params, Task
from hfbatch.tasks.parts.text import (
    collate_text,
    flatten,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
    require_tokens,
    run_text,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch


class FeatureExtractionParams(Params):
    """Which vectors to return."""

    layer: int | None = None
    """Hidden layer to read, 0 for the input embeddings, -1 for the last; null takes what the model gives out."""


class FeatureExtraction(Task):
    """The model's vector for each token, special tokens included."""

    name = "feature-extraction"
    general = False
    summary = "A vector for each token of a text"
    auto_class = "AutoModel"
    inputs = (text_column("text"),)
    outputs: ClassVar[Mapping[str, str]] = {"features": "list over tokens of fixed-size list of float32"}
    Params = FeatureExtractionParams
    split_rows = 512
    ragged: ClassVar[Mapping[str, str]] = {"features": "length"}
    histogram = Histogram("tokens", tuple(float(2**k) for k in range(16)))
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]})

    params: FeatureExtractionParams

    @cached_property
    def limit(self) -> int | None:
        """Most tokens of a row."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def dimension(self) -> int | None:
        """Numbers in a vector; None when the config does not tell."""
        return getattr(self.config.get_text_config(), "hidden_size", None)

    def check(self) -> list[str]:
        """Faults: a model without a hidden size or that layer, and a length beyond the model's."""
        faults = []
        if self.dimension is None:
            faults.append(f"model {self.model.name!r}: its config has no hidden_size; choose a text encoder")
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        layer = self.params.layer
        if layer is not None and layers is not None and not -layers - 1 <= layer <= layers:
            faults.append(
                f"params.layer {layer} is not there: model {self.model.name!r} has layers 0 to {layers}"
            )
        return faults + length_faults(self.max_length, self.tokenizer, self.config)

    def output_fields(self) -> list[pa.Field]:
        """`features`: list<fixed_size_list<float32>[hidden size]>."""
        return [pa.field("features", pa.list_(pa.list_(pa.float32(), self.dimension or 0)))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokens of each text. :raises ValueError: for a text without any token."""
        return require_tokens(tokenize(self.tokenizer, columns["text"].to_pylist(), max_length=self.limit))

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Tokens of each row."""
        return list_lengths(features["input_ids"])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Rows padded on the right; the vectors of padding are cut off again."""
        pad = padding_id(self.tokenizer, self.config)
        return collate_text(features, rows, pad, multiple, limit=self.limit)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`features` float32 [batch, tokens, size], and `length` int32 [batch] of those that are no padding."""
        import torch

        if self.params.layer is None:
            hidden = run_text(model, batch)[0]
        else:
            hidden = run_text(model, batch, output_hidden_states=True).hidden_states[self.params.layer]
        length = batch["attention_mask"].sum(1).to(torch.int32)
        return {"features": hidden.float().contiguous(), "length": length}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """The vectors as they came."""
        return [flatten(outputs["features"])]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Tokens of each row."""
        return list_lengths(outputs["features"])
