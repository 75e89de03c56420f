"""Task sparse-embedding: computes one vector over the vocabulary for each text, as SPLADE models do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.agreement import SparseVectors
from hfbatch.tasks.base import Example, Features, Histogram
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.prompts import PromptedTask, PromptParams
from hfbatch.tasks.text.sparse_files import SparseFiles, read_sparse_files
from hfbatch.tasks.tokens import (
    compact,
    flatten,
    list_lengths,
    require_tokens,
    run_text,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch

CELLS = 1 << 24
"""Logits that are transformed together."""


class SparseEmbeddingParams(PromptParams):
    """Options for pooling the logits of tokens into one vector."""

    pooling: Literal["auto", "max", "sum"] = "auto"
    """Pooling over the tokens; auto follows the model's sentence-transformers files, else uses max."""
    activation: Literal["auto", "relu", "log1p_relu"] = "auto"
    """What is computed from a logit: relu for log(1 + relu(x)), log1p_relu for log(1 + log(1 + relu(x))); auto follows the
    model's sentence-transformers files, else uses relu."""
    max_active_dims: int | None = Field(default=None, ge=1)
    """Number of dimensions to keep of each row, those with the largest values; null keeps all that are not zero."""


class SparseEmbedding(PromptedTask, EncoderTask):
    """Returns a weight for each token of the vocabulary that a text is about, its own tokens and others."""

    name = "sparse-embedding"
    general = False
    summary = "Weights over the vocabulary for each text, by a model such as SPLADE, for search in an inverted index"
    auto_class = "AutoModelForMaskedLM"
    inputs = (text_column("text"),)
    outputs: ClassVar[Mapping[str, str]] = {
        "indices": "list<int32>: ids of the vocabulary whose weight is not zero, ascending",
        "values": "list<float32>: their weights, all above zero",
    }
    Params = SparseEmbeddingParams
    split_rows = 2048
    ragged: ClassVar[Mapping[str, str]] = {"indices": "count", "values": "count"}
    agreement = SparseVectors("indices", "values")
    histogram = Histogram("active dimensions", tuple(float(2**k) for k in range(18)))
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]}, {"max_active_dims": 8})

    params: SparseEmbeddingParams

    @cached_property
    def recipe(self) -> SparseFiles:
        """Settings from the model's sentence-transformers files."""
        return read_sparse_files(self.model)

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row."""
        return self.max_length or self.own_limit

    @property
    def pooling(self) -> str:
        """`max` or `sum`."""
        return self.recipe.pooling if self.params.pooling == "auto" else self.params.pooling

    @property
    def activation(self) -> str:
        """`relu` or `log1p_relu`."""
        return self.recipe.activation if self.params.activation == "auto" else self.params.activation

    def check(self) -> list[str]:
        """Returns errors in the model's files, in the length limit and in the prompt."""
        faults = [f"model {self.model.name!r}: {fault}" for fault in self.recipe.faults]
        return [*faults, *super().check(), *self.prompt_faults()]

    def notes(self) -> list[str]:
        """Returns notes on defaults without sentence-transformers files, and on unused prompts."""
        notes = self.prompt_notes()
        if not self.recipe.found:
            notes.append(
                f"no sentence-transformers files beside the model: {self.pooling} pooling with activation {self.activation}; a "
                "model that was not trained for it, such as one for fill-mask, gives vectors that are hardly sparse"
            )
        return notes

    def output_fields(self) -> list[pa.Field]:
        """`indices` and `values`."""
        return [
            pa.field("indices", pa.list_(pa.int32())),
            pa.field("values", pa.list_(pa.float32())),
        ]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text with the prompt. :raises ValueError: for a text without any token."""
        texts = self.prompted(columns["text"].to_pylist())
        return require_tokens(tokenize(self.tokenizer, texts, max_length=self.limit))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns what is not zero of each vector.

        :returns: `indices` int32 and `values` float32 [batch, widest], `count` int32 [batch] of them in each row.
        """
        import torch

        vectors = self._pool(run_text(model, batch).logits, batch.get("attention_mask"))
        most = self.params.max_active_dims
        if most is None or most >= vectors.shape[1]:
            indices = torch.arange(vectors.shape[1], dtype=torch.int32, device=vectors.device)
            indices = indices.expand_as(vectors)
        else:
            best = vectors.topk(most).indices.sort().values
            vectors, indices = vectors.gather(1, best), best.to(torch.int32)
        # Not `> 0`: NaN has to stay, since a row is rejected by it.
        count, indices, values = compact(~(vectors <= 0), indices, vectors)
        return {"indices": indices, "values": values, "count": count}

    def _pool(self, logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Pools logits [batch, tokens, vocabulary], a few tokens after another: float32 [batch, vocabulary].

        :param mask: 1 for a token, 0 for padding, [batch, tokens]; None if nothing is padded.
        """
        import torch

        rows, tokens, size = logits.shape
        step = max(CELLS // (rows * size), 1)
        pooled = torch.zeros((rows, size), device=logits.device)
        for start in range(0, tokens, step):
            part = logits[:, start : start + step].float()
            if mask is not None:
                part = part.masked_fill(mask[:, start : start + step, None] == 0, 0)
            if self.pooling == "max":  # the activation does not decrease: it may follow the maximum
                pooled = torch.maximum(pooled, part.amax(1))
            else:
                pooled += self._activate(part).sum(1)
        return self._activate(pooled) if self.pooling == "max" else pooled

    def _activate(self, logits: torch.Tensor) -> torch.Tensor:
        weights = logits.relu().log1p()
        return weights.log1p() if self.activation == "log1p_relu" else weights

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns indices and values unchanged."""
        return [flatten(outputs["indices"]), flatten(outputs["values"])]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of dimensions of each row that are not zero."""
        return list_lengths(outputs["indices"])
