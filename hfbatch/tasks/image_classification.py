"""Task image-classification: labels and scores of a picture. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.text import flatten
from hfbatch.tasks.vision import ImageTask


class ImageClassificationParams(Params):
    """Which labels to return, and how scores are made."""

    top_k: int = Field(default=5, ge=1)
    """How many labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """What turns logits into scores; null goes by the model's problem type and number of labels."""


class ImageClassification(ImageTask):
    """The best labels of each picture, with their scores."""

    name = "image-classification"
    summary = "Labels and scores of a picture"
    auto_class = "AutoModelForImageClassification"
    pipeline = "image_classification.ImageClassificationPipeline"
    keeps: ClassVar[tuple[str, ...] | None] = ("logits",)
    outputs: ClassVar[Mapping[str, str]] = {
        "label": "list<string>, best first",
        "score": "list<float32>",
    }
    Params: ClassVar[type[base.Params]] = ImageClassificationParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"top_k": 2})

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`, lists of one length."""
        return [pa.field("label", pa.list_(pa.string())), pa.field("score", pa.list_(pa.float32()))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Labels and scores apart."""
        return [one["label"] for one in result], [one["score"] for one in result]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        scores = flatten(columns[1])
        return scores.values.to_numpy()[scores.offsets.to_numpy()[:-1]]
