"""Task zero-shot-object-detection: boxes of what the user names. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, InputColumn, Params
from hfbatch.tasks.object_detection import ObjectDetection
from hfbatch.tasks.parts.text import is_words
from hfbatch.tasks.parts.vision import IMAGE


class ZeroShotObjectDetectionParams(Params):
    """What to look for, and which boxes to return."""

    candidate_labels: list[str] | None = Field(default=None, min_length=1)
    """What to look for in every picture; a column `candidate_labels` goes before it."""
    threshold: float = Field(default=0.1, ge=0, le=1)
    """Boxes of a lower score are left out."""
    top_k: int | None = Field(default=None, ge=1)
    """Most boxes of a picture; null returns all."""


class ZeroShotObjectDetection(ObjectDetection):
    """What each picture shows of what the user names, and where."""

    name = "zero-shot-object-detection"
    summary = "Boxes of what you name in a picture, by a model such as OWL-ViT"
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
        """Of the params, those that the pipeline takes when it is made."""
        options = super().options()
        options.pop("candidate_labels", None)
        return options

    def column_faults(self, present: set[str]) -> list[str]:
        """A fault where nobody says what to look for."""
        if self.params.candidate_labels or "candidate_labels" in present:
            return []
        return [
            "params.candidate_labels: nothing to look for; name labels, or give a column candidate_labels"
        ]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Pictures with the labels."""
        images = super().rows(columns)
        if "candidate_labels" not in columns:
            yield from (
                {"image": image, "candidate_labels": self.params.candidate_labels} for image in images
            )
            return
        for image, labels in zip(images, columns["candidate_labels"].to_pylist(), strict=True):
            yield {"image": image, "candidate_labels": labels}
