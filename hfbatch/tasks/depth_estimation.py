"""Task depth-estimation: how far each pixel of a picture is. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_png
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.text import list_lengths
from hfbatch.tasks.parts.vision import ImageTask


class DepthEstimationParams(Params):
    """There is nothing to choose."""


class DepthEstimation(ImageTask):
    """A map of depths for each picture."""

    name = "depth-estimation"
    summary = "How far each pixel of a picture is"
    auto_class = "AutoModelForDepthEstimation"
    pipeline = "depth_estimation.DepthEstimationPipeline"
    keeps = ("predicted_depth", "target_size", "field_of_view")
    outputs: ClassVar[Mapping[str, str]] = {
        "predicted_depth": "list<list<float32>>, rows of pixels in the picture's size",
        "depth": "binary: the same as a grey PNG, from least to most",
    }
    Params = DepthEstimationParams
    histogram = Histogram("rows of pixels", (0.0, *(float(2**k) for k in range(14))))
    EXAMPLE = Example({"image": ["room.jpg"]})

    def output_fields(self) -> list[pa.Field]:
        """`predicted_depth` in the model's unit, and `depth`, a picture of it."""
        rows = pa.list_(pa.list_(pa.float32()))
        return [pa.field("predicted_depth", rows), pa.field("depth", pa.binary())]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Rows of pixels, and a PNG."""
        return list(result["predicted_depth"].numpy()), to_png(result["depth"])

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Height of each picture, in pixels."""
        return list_lengths(columns[0])
