"""Task feature-extraction: returns a vector for each token of a text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.engines.base import Capability
from hfbatch.tasks.agreement import Vectors
from hfbatch.tasks.base import Batch, Example, Features, Histogram, Params
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.tokens import (
    collate_text,
    flatten,
    list_lengths,
    lists_of,
    require_tokens,
    run_text,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch


class FeatureExtractionParams(Params):
    """Which vectors to return."""

    layer: int | Annotated[list[int], Field(min_length=1)] | None = None
    """Hidden layer to return, 0 for the input embeddings, -1 for the last, or a list; null: the model's output."""
    attentions: bool = False
    """Also return the attention weights of every layer and head; large: tokens times tokens for each of them."""


class FeatureExtraction(EncoderTask):
    """Returns the model's vector for each token, special tokens included."""

    name = "feature-extraction"
    general = False
    summary = "A vector for each token of a text, from the layers you choose; optionally attentions"
    auto_class = "AutoModel"
    inputs = (text_column("text"),)
    outputs: ClassVar[Mapping[str, str]] = {
        "features": "list over tokens of fixed-size list of float32; for several layers, one for each",
        "attentions": "if requested: lists over layers, heads, tokens and tokens attended to, of float32",
    }
    Params = FeatureExtractionParams
    split_rows = 512
    ragged: ClassVar[Mapping[str, str]] = {"features": "length", "attentions": "cells"}
    agreement = Vectors("features")
    histogram = Histogram("tokens", tuple(float(2**k) for k in range(16)))
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]})

    params: FeatureExtractionParams

    @cached_property
    def dimension(self) -> int | None:
        """Dimension of the vectors; None if the config does not specify it."""
        return getattr(self.config.get_text_config(), "hidden_size", None)

    def check(self) -> list[str]:
        """Returns errors for a model without hidden_size or the chosen layers, and for a length beyond its limit."""
        faults = super().check()
        if self.dimension is None:
            faults.append(f"model {self.model.name!r}: its config has no hidden_size; choose a text encoder")
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        chosen = self.params.layer if isinstance(self.params.layer, list) else [self.params.layer]
        for layer in chosen:
            if layer is not None and layers is not None and not -layers - 1 <= layer <= layers:
                faults.append(
                    f"params.layer {layer} does not exist: model {self.model.name!r} has layers 0 to {layers}"
                )
        return faults

    def notes(self) -> list[str]:
        """Returns the memory that attentions take."""
        config = self.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if not self.params.attentions or heads is None:
            return []
        size = config.num_hidden_layers * heads * 128 * 128 * 4 / 1e6
        return [f"attentions of 128 tokens take {size:,.1f} MB; lower input.split_rows if memory is short"]

    def output_fields(self) -> list[pa.Field]:
        """`features`: list<fixed_size_list<float32>[hidden size]>; and `attentions`, nested four deep, if requested."""
        vector = pa.list_(pa.float32(), self.dimension or 0)
        if isinstance(self.params.layer, list):
            vector = pa.list_(vector, len(self.params.layer))
        fields = [pa.field("features", pa.list_(vector))]
        if self.params.attentions:
            heads = pa.list_(pa.list_(pa.list_(pa.float32())))
            fields.append(pa.field("attentions", pa.list_(heads)))
        return fields

    @property
    def asks(self) -> frozenset[Capability]:
        """Also the module for layers and attentions, which models return only on demand."""
        more = self.params.attentions or self.params.layer is not None
        return super().asks | {Capability.MODULE} if more else super().asks

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text. :raises ValueError: for a text without any token."""
        return require_tokens(tokenize(self.tokenizer, columns["text"].to_pylist(), max_length=self.limit))

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns rows padded on the right; the vectors of padding are removed again."""
        batch = collate_text(features, rows, self.pad_id, multiple, limit=self.limit)
        return {**batch, "sizes": batch["attention_mask"].sum(1).tolist()}

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns vectors of tokens, and attentions if requested.

        :returns: `features` float32 [batch, tokens, size], or [batch, tokens, layers * size], and `length` int32
            [batch] of those that are not padding; `attentions` float32 [batch, cells], a row's layers, heads, tokens
            and tokens attended to in this order, and `cells` int64 [batch], their number.
        """
        import torch

        layer, attentions, sizes = self.params.layer, self.params.attentions, batch.pop("sizes")
        if attentions and model.config._attn_implementation != "eager":
            model.set_attn_implementation("eager")  # other implementations do not return weights
        options = {"output_hidden_states": layer is not None, "output_attentions": attentions}
        output = run_text(model, batch, **{name: True for name, asked in options.items() if asked})
        if isinstance(layer, list):
            hidden = torch.cat([output.hidden_states[one] for one in layer], dim=-1)
        else:
            hidden = output[0] if layer is None else output.hidden_states[layer]
        length = batch["attention_mask"].sum(1).to(torch.int32)
        found = {"features": hidden.float().contiguous(), "length": length}
        if attentions:
            whole = torch.stack(output.attentions, dim=1).float()
            rows = [row[..., :size, :size].flatten() for row, size in zip(whole, sizes, strict=True)]
            found["attentions"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            found["cells"] = length.long() ** 2 * whole.shape[1] * whole.shape[2]
        return found

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the vectors unchanged, split by layer if there are several."""
        features = flatten(outputs["features"])
        if isinstance(self.params.layer, list):
            numbers = features.flatten().flatten()
            vectors = pa.FixedSizeListArray.from_arrays(numbers, self.dimension)
            layers = pa.FixedSizeListArray.from_arrays(vectors, len(self.params.layer))
            features = lists_of(layers, list_lengths(features))
        if not self.params.attentions:
            return [features]
        config = self.config.get_text_config()
        layers, heads, sizes = config.num_hidden_layers, config.num_attention_heads, list_lengths(features)
        nested = flatten(outputs["attentions"]).flatten()
        for counts in (
            np.repeat(sizes, layers * heads * sizes),
            np.repeat(sizes, layers * heads),
            np.full(layers * len(sizes), heads),
            np.full(len(sizes), layers),
        ):
            nested = lists_of(nested, counts)
        return [features, nested]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of tokens in each row."""
        return list_lengths(outputs["features"])
