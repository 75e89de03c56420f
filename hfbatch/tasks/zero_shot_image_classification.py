"""Task zero-shot-image-classification: scores of labels that the user names. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.image_classification import ImageClassification


class ZeroShotImageClassificationParams(Params):
    """The labels, and how they are put to the model."""

    candidate_labels: list[str] = Field(min_length=1)
    """The labels to choose among."""
    hypothesis_template: str = "This is a photo of {}."
    """The caption that is compared with the picture, with the label in place of {}."""


class ZeroShotImageClassification(ImageClassification):
    """Labels named by the user, best first, for each picture."""

    name = "zero-shot-image-classification"
    summary = "Scores of labels that you name for a picture, by a model such as CLIP"
    auto_class = "AutoModelForZeroShotImageClassification"
    pipeline = "zero_shot_image_classification.ZeroShotImageClassificationPipeline"
    keeps = ("logits", "candidate_labels")
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = ZeroShotImageClassificationParams
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"candidate_labels": ["a cat", "a dog"]})

    params: Any
