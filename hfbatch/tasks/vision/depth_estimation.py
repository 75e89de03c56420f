"""Task depth-estimation: estimates the depth of each pixel of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_png
from hfbatch.tasks.agreement import Pixels
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.tokens import list_lengths
from hfbatch.tasks.vision.vision import ImageTask


class DepthEstimationParams(Params):
    """The task has no options."""


class DepthEstimation(ImageTask):
    """Returns a depth map for each image."""

    name = "depth-estimation"
    summary = "Depth of each pixel of an image"
    auto_class = "AutoModelForDepthEstimation"
    pipeline = "depth_estimation.DepthEstimationPipeline"
    keeps = ("predicted_depth", "target_size", "field_of_view")
    outputs: ClassVar[Mapping[str, str]] = {
        "predicted_depth": "list<list<float32>>, rows of pixels at the image's size",
        "depth": "binary: the same as a grayscale PNG, from minimum to maximum",
    }
    Params = DepthEstimationParams
    agreement = Pixels("predicted_depth")
    histogram = Histogram("rows of pixels", (0.0, *(float(2**k) for k in range(14))))
    EXAMPLE = Example({"image": ["room.jpg"]})

    def output_fields(self) -> list[pa.Field]:
        """`predicted_depth` in the model's unit, and `depth`, a PNG of it."""
        rows = pa.list_(pa.list_(pa.float32()))
        return [pa.field("predicted_depth", rows), pa.field("depth", pa.binary())]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns rows of pixels, and a PNG."""
        return list(result["predicted_depth"].numpy()), to_png(result["depth"])

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the height of each image, in pixels."""
        return list_lengths(columns[0])
