"""Task image-to-image: pictures made larger, with the detail of the larger size. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_png
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.vision import ImageTask


class ImageToImageParams(Params):
    """What is returned of each picture."""

    crop: bool = False
    """Cut off the border that the image processor adds at the right and at the bottom to fill its windows."""


class ImageToImage(ImageTask):
    """A larger picture for each picture."""

    name = "image-to-image"
    summary = "Pictures made larger, by a model such as Swin2SR"
    aliases = ("super-resolution",)
    auto_class = "AutoModelForImageToImage"
    pipeline = "hfbatch.tasks.parts.pictures.ImageToImagePipeline"
    outputs: ClassVar[Mapping[str, str]] = {"generated_image": "binary: PNG"}
    Params = ImageToImageParams
    split_rows = 32
    histogram = Histogram("bytes of PNG", (0.0, *(float(2**k) for k in range(8, 28))))
    EXAMPLE = Example({"image": ["small.png"]}, {"crop": True})

    def output_fields(self) -> list[pa.Field]:
        """`generated_image`, a file."""
        return [pa.field("generated_image", pa.binary())]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """The picture as PNG."""
        return (to_png(result),)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Bytes of each file."""
        return np.array([len(file) for file in columns[0].to_pylist()])
