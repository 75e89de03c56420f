"""Task image-classification: labels and scores of a picture. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.parts.pipeline import LabelTask
from hfbatch.tasks.parts.vision import ImageTask


class ImageClassificationParams(Params):
    """Which labels to return, and how scores are made."""

    top_k: int = Field(default=5, ge=1)
    """How many labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """What turns logits into scores; null goes by the model's problem type and number of labels."""


class ImageClassification(LabelTask, ImageTask):
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
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"top_k": 2})
