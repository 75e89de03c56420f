"""Task text-classification: returns labels and scores of a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Labels
from hfbatch.tasks.base import Example, Features, Histogram, Params
from hfbatch.tasks.labels import best_labels, label_names, named_lists, score_function
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.tokens import flatten, require_tokens, text_column, tokenize

if TYPE_CHECKING:
    import torch


class TextClassificationParams(Params):
    """Options for the returned labels and scores."""

    top_k: int | None = Field(default=1, ge=1)
    """Number of labels to return, best first; null returns all. With 1, label and score are not lists."""
    function_to_apply: Literal["default", "softmax", "sigmoid", "none"] = "default"
    """Function applied to logits; by default depends on the model's problem type and number of labels."""


class TextClassification(EncoderTask):
    """Returns the top labels of each text, with their scores."""

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
    agreement = Labels("label")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"text": ["A lovely movie.", "Never again.", ""]}, {"top_k": 1})

    params: TextClassificationParams

    @cached_property
    def labels(self) -> list[str]:
        """Label names, by class index."""
        return label_names(self.config)

    @cached_property
    def count(self) -> int:
        """Number of labels per row."""
        return min(self.params.top_k or len(self.labels), len(self.labels))

    @cached_property
    def function(self) -> str:
        """Function applied to logits (softmax, sigmoid or none), as in transformers' pipeline."""
        asked = self.params.function_to_apply
        return score_function(self.config) if asked == "default" else asked

    @property
    def own_agreement(self) -> Labels:
        """Compares scores as the function makes them: which exclude each other, independent ones, or numbers."""
        return Labels("label", function=self.function)

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`: a string and a float32, or a list of each where top_k is not 1."""
        if self.params.top_k == 1:
            return [pa.field("label", pa.string()), pa.field("score", pa.float32())]
        return [pa.field("label", pa.list_(pa.string())), pa.field("score", pa.list_(pa.float32()))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text or pair. :raises ValueError: for a text without any token."""
        pairs = columns["text_pair"].to_pylist() if "text_pair" in columns else None
        return require_tokens(tokenize(self.tokenizer, columns["text"].to_pylist(), pairs, self.limit))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `score` float32 and `label` (class index) int32: [batch, count], best first; [batch] for top_k 1."""
        best = best_labels(self.classify(model, batch), self.function, self.count)
        return {name: found[:, 0] for name, found in best.items()} if self.params.top_k == 1 else best

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Replaces class indices with names."""
        if self.params.top_k == 1:
            names = pa.array(self.labels, pa.string())
            return [names.take(flatten(outputs["label"])), flatten(outputs["score"])]
        return named_lists(outputs, self.labels)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best label of each row."""
        score = flatten(outputs["score"])
        if self.params.top_k == 1:
            return score.to_numpy()
        return score.flatten().to_numpy().reshape(len(score), -1)[:, 0]
