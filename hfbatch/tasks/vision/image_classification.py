"""Task image-classification: returns labels and scores of an image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.answer_agreement import Labels
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.labels import (
    LABEL_LISTS,
    best_labels,
    best_scores,
    label_names,
    named_lists,
    score_function,
)
from hfbatch.tasks.vision.vision import PixelTask

if TYPE_CHECKING:
    import torch


class ImageClassificationParams(Params):
    """Options for the returned labels and scores."""

    top_k: int = Field(default=5, ge=1)
    """Number of labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """Function applied to logits; null depends on the model's problem type and number of labels."""


class ImageClassification(PixelTask):
    """Returns the top labels of each image, with their scores."""

    name = "image-classification"
    summary = "Labels and scores of an image"
    auto_class = "AutoModelForImageClassification"
    outputs: ClassVar[Mapping[str, str]] = {
        "label": "list<string>, best first",
        "score": "list<float32>",
    }
    Params: ClassVar[type[base.Params]] = ImageClassificationParams
    agreement = Labels("label")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"top_k": 2})

    @cached_property
    def labels(self) -> list[str]:
        """Label names, by class index."""
        return label_names(self.config)

    @cached_property
    def function(self) -> str:
        """Function applied to logits: softmax, sigmoid or none."""
        return self.params.function_to_apply or score_function(self.config)

    @cached_property
    def count(self) -> int:
        """Number of labels per row."""
        return min(self.params.top_k, len(self.labels))

    @property
    def own_agreement(self) -> Labels:
        """Compares scores as the function makes them: which exclude each other, independent ones, or numbers."""
        return Labels("label", function=self.function)

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`, lists of equal length."""
        return list(LABEL_LISTS)

    def logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits of all labels, [images, labels]."""
        return model(**inputs).logits

    def run(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `label` (class index) int32 and `score` float32, best first: [images, count]."""
        return best_labels(self.logits(model, inputs), self.function, self.count)

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Replaces class indices with names."""
        return named_lists(outputs, self.labels)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best label of each row."""
        return best_scores(columns)
