"""Task image-to-image: upscales images (super-resolution)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_png
from hfbatch.tasks.agreement import Pixels
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.vision.vision import ImageTask


class ImageToImageParams(Params):
    """Options for the returned images."""

    crop: bool = False
    """Remove the padding that the image processor adds at the right and bottom to fill its windows."""


class ImageToImage(ImageTask):
    """Returns an upscaled image for each image."""

    name = "image-to-image"
    summary = "Upscaled images, by a model such as Swin2SR"
    aliases = ("super-resolution",)
    auto_class = "AutoModelForImageToImage"
    pipeline = "hfbatch.tasks.vision.image_pipelines.ImageToImagePipeline"
    outputs: ClassVar[Mapping[str, str]] = {"generated_image": "binary: PNG"}
    Params = ImageToImageParams
    split_rows = 32
    agreement = Pixels("generated_image")
    histogram = Histogram("bytes of PNG", (0.0, *(float(2**k) for k in range(8, 28))))
    EXAMPLE = Example({"image": ["small.png"]}, {"crop": True})

    def output_fields(self) -> list[pa.Field]:
        """`generated_image`, a PNG file."""
        return [pa.field("generated_image", pa.binary())]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns the image as PNG."""
        return (to_png(result),)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the size of each file in bytes."""
        return np.array([len(file) for file in columns[0].to_pylist()])
