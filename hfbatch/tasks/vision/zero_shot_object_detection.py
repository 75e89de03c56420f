"""Task zero-shot-object-detection: returns boxes of user-defined labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, InputColumn, Params
from hfbatch.tasks.tokens import is_words
from hfbatch.tasks.vision.object_detection import ObjectDetection
from hfbatch.tasks.vision.vision import IMAGE


class ZeroShotObjectDetectionParams(Params):
    """The candidate labels and options for the returned boxes."""

    candidate_labels: list[str] | None = Field(default=None, min_length=1)
    """Labels to detect in every image; a column `candidate_labels` takes precedence."""
    threshold: float = Field(default=0.1, ge=0, le=1)
    """Boxes with a lower score are dropped."""
    top_k: int | None = Field(default=None, ge=1)
    """Maximum number of boxes per image; null returns all."""


class ZeroShotObjectDetection(ObjectDetection):
    """Returns the objects with user-defined labels in each image, with their boxes."""

    name = "zero-shot-object-detection"
    summary = "Boxes of labels that you define in an image, by a model such as OWL-ViT"
    auto_class = "AutoModelForZeroShotObjectDetection"
    pipeline = "zero_shot_object_detection.ZeroShotObjectDetectionPipeline"
    inputs = (IMAGE, InputColumn("candidate_labels", is_words, "list<string>", required=False))
    keeps = ("logits", "pred_boxes", "target_size", "candidate_label", "is_last")
    outputs: ClassVar[Mapping[str, str]] = {
        "objects": "list<struct<score, label, box: struct<xmin, ymin, xmax, ymax>>>, best first, boxes in pixels"
    }
    Params = ZeroShotObjectDetectionParams
    EXAMPLE = Example({"image": ["street.jpg"]}, {"candidate_labels": ["a bicycle", "a tram"]})

    params: ZeroShotObjectDetectionParams

    def options(self) -> dict[str, Any]:
        """Returns the params of the pipeline's constructor."""
        options = super().options()
        options.pop("candidate_labels", None)
        return options

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error if there are no candidate labels."""
        if self.params.candidate_labels or "candidate_labels" in present:
            return []
        return ["params.candidate_labels: no labels to detect; set labels, or give a column candidate_labels"]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields images with their labels."""
        images = super().rows(columns)
        if "candidate_labels" not in columns:
            yield from (
                {"image": image, "candidate_labels": self.params.candidate_labels} for image in images
            )
            return
        for image, labels in zip(images, columns["candidate_labels"].to_pylist(), strict=True):
            yield {"image": image, "candidate_labels": labels}
