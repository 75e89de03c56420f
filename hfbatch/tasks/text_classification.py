"""Task text-classification: labels and scores of a text or a pair of texts. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Features, Histogram, Params
from hfbatch.tasks.parts.encoder import EncoderTask
from hfbatch.tasks.parts.labels import best_labels, label_names, named_lists, score_function
from hfbatch.tasks.parts.text import flatten, require_tokens, text_column, tokenize

if TYPE_CHECKING:
    import torch


class TextClassificationParams(Params):
    """Which labels to return, and how scores are made."""

    top_k: int | None = Field(default=1, ge=1)
    """How many labels to return, best first; null returns all. With 1, label and score are not lists."""
    function_to_apply: Literal["default", "softmax", "sigmoid", "none"] = "default"
    """What turns logits into scores; default goes by the model's problem type and number of labels."""


class TextClassification(EncoderTask):
    """The best labels of each text, with their scores."""

    name = "text-classification"
    aliases = ("sentiment-analysis",)
    summary = "Labels and scores of a text or a pair of texts; regression too"
    auto_class = "AutoModelForSequenceClassification"
    inputs = (text_column("text"), text_column("text_pair", required=False))
    outputs: ClassVar[Mapping[str, str]] = {
        "label": "string; list of them, best first, unless top_k is 1",
        "score": "float32; list of them unless top_k is 1",
    }
    Params = TextClassificationParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"text": ["A lovely film.", "Never again.", ""]}, {"top_k": 1})

    params: TextClassificationParams

    @cached_property
    def labels(self) -> list[str]:
        """Label names by class index."""
        return label_names(self.config)

    @cached_property
    def count(self) -> int:
        """How many labels a row gets."""
        return min(self.params.top_k or len(self.labels), len(self.labels))

    @cached_property
    def function(self) -> str:
        """What turns logits into scores: softmax, sigmoid or none, by the rule of transformers' pipeline."""
        asked = self.params.function_to_apply
        return score_function(self.config) if asked == "default" else asked

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`: a string and a float32, or a list of each where top_k is not 1."""
        if self.params.top_k == 1:
            return [pa.field("label", pa.string()), pa.field("score", pa.float32())]
        return [pa.field("label", pa.list_(pa.string())), pa.field("score", pa.list_(pa.float32()))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokens of each text or pair. :raises ValueError: for a text without any token."""
        pairs = columns["text_pair"].to_pylist() if "text_pair" in columns else None
        return require_tokens(tokenize(self.tokenizer, columns["text"].to_pylist(), pairs, self.limit))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`score` float32, `label` (class index) int32, best first: [batch, count], or [batch] for top_k 1."""
        best = best_labels(self.classify(model, batch), self.function, self.count)
        return {name: found[:, 0] for name, found in best.items()} if self.params.top_k == 1 else best

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Names in place of class indices."""
        if self.params.top_k == 1:
            names = pa.array(self.labels, pa.string())
            return [names.take(flatten(outputs["label"])), flatten(outputs["score"])]
        return named_lists(outputs, self.labels)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        score = flatten(outputs["score"])
        if self.params.top_k == 1:
            return score.to_numpy()
        return score.flatten().to_numpy().reshape(len(score), -1)[:, 0]
