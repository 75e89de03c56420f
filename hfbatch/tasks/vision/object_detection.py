"""Task object-detection: returns boxes, labels and scores of objects in an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.answer_agreement import Items
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.tokens import list_lengths
from hfbatch.tasks.vision.masks import box_overlap
from hfbatch.tasks.vision.vision import DETECTED, ImageTask


class ObjectDetectionParams(Params):
    """Options for the returned boxes."""

    threshold: float = Field(default=0.5, ge=0, le=1)
    """Boxes with a lower score are dropped."""


class ObjectDetection(ImageTask):
    """Returns the objects in each image, with their boxes."""

    name = "object-detection"
    summary = "Boxes, labels and scores of objects in an image"
    auto_class = "AutoModelForObjectDetection"
    pipeline = "object_detection.ObjectDetectionPipeline"
    keeps: ClassVar[tuple[str, ...] | None] = ("logits", "pred_boxes", "target_size", "bbox")
    outputs: ClassVar[Mapping[str, str]] = {
        "objects": "list<struct<score, label, box: struct<xmin, ymin, xmax, ymax>>>, boxes in pixels"
    }
    Params: ClassVar[type[base.Params]] = ObjectDetectionParams
    agreement = Items("objects", "box", box_overlap)
    histogram = Histogram("objects", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example({"image": ["street.jpg"]}, {"threshold": 0.7})

    def output_fields(self) -> list[pa.Field]:
        """`objects`: a list of structs with the keys that the pipeline returns."""
        return [pa.field("objects", DETECTED)]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of objects in each row."""
        return list_lengths(columns[0])
