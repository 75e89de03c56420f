"""Task keypoint-matching: matches points of two images that show the same place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_image
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.tokens import list_lengths
from hfbatch.tasks.vision.vision import IMAGE

if TYPE_CHECKING:
    import torch

POINT = pa.struct([("x", pa.int32()), ("y", pa.int32())])
MATCHES = pa.list_(
    pa.struct([("keypoint_image_0", POINT), ("keypoint_image_1", POINT), ("score", pa.float32())])
)


class KeypointMatchingParams(Params):
    """Options for the returned matches."""

    threshold: float = Field(default=0.0, ge=0, le=1)
    """Matches with this score or a lower one are dropped."""


class KeypointMatching(PipelineTask):
    """Returns matching points of two images, best match first."""

    name = "keypoint-matching"
    summary = "Points of two images that show the same place, by a model such as SuperGlue"
    auto_class = "AutoModelForKeypointMatching"
    pipeline = "hfbatch.tasks.vision.image_pipelines.KeypointMatchingPipeline"
    batched = False
    keeps = ("mask", "matches", "matching_scores", "keypoints", "sizes")
    inputs = (replace(IMAGE, name="image_0"), replace(IMAGE, name="image_1"))
    outputs: ClassVar[Mapping[str, str]] = {
        "matches": "list<struct<keypoint_image_0: struct<x, y>, keypoint_image_1: struct<x, y>, score>>, "
        "best first, x and y in pixels of the image"
    }
    Params = KeypointMatchingParams
    split_rows = 64
    histogram = Histogram("matches", (0.0, *(float(2**k) for k in range(12))))
    EXAMPLE = Example({"image_0": ["tower_left.jpg"], "image_1": ["tower_right.jpg"]}, {"threshold": 0.2})

    def notes(self) -> list[str]:
        """Returns a note on the precision of points."""
        return [
            "points are as precise as the model's dtype: float32 resolves single pixels, bfloat16 about "
            "256 positions along an image side (model.dtype: float32)"
        ]

    def output_fields(self) -> list[pa.Field]:
        """`matches`: a list of structs with the keys that the transformers pipeline returns."""
        return [pa.field("matches", MATCHES)]

    def chooses_by(self) -> tuple[type[torch.nn.Module], ...]:
        """All layers with weights: keypoints with NaN scores are dropped, and without matches no output shows NaN."""
        import torch

        return (torch.nn.Conv2d, torch.nn.Linear)

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields pairs of images, decoded one by one."""
        for pair in zip(columns["image_0"], columns["image_1"], strict=True):
            yield tuple(to_image(value.as_py(), self.files) for value in pair)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of matches in each row."""
        return list_lengths(columns[0])
