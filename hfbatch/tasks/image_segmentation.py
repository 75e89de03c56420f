"""Task image-segmentation: which pixels belong to what. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.masks import MaskFormat, mask_type, pack_mask
from hfbatch.tasks.parts.text import list_lengths
from hfbatch.tasks.parts.vision import ImageTask

LOADERS = {
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForInstanceSegmentation": "AutoModelForUniversalSegmentation",
    "ForUniversalSegmentation": "AutoModelForUniversalSegmentation",
}
"""The AutoClass of models that another than the usual one loads, by the end of their class's name."""


class ImageSegmentationParams(Params):
    """What counts as a segment; null takes the pipeline's default."""

    subtask: Literal["panoptic", "instance", "semantic"] | None = None
    """Things and background, things alone, or classes of pixels; null takes the first that the model can do."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Segments of a lower score are left out."""
    mask_threshold: float | None = Field(default=None, ge=0, le=1)
    """From which value on a pixel belongs to a mask."""
    overlap_mask_area_threshold: float | None = Field(default=None, ge=0, le=1)
    """Parts of a mask smaller than this share of it are dropped."""
    mask_format: MaskFormat = "png"
    """How masks are written: png, white where the mask holds; or rle, COCO's uncompressed run lengths."""


class ImageSegmentation(ImageTask):
    """Masks of what each picture shows."""

    name = "image-segmentation"
    summary = "Masks of what a picture shows: panoptic, instance or semantic"
    auto_class = "AutoModelForImageSegmentation"
    pipeline = "image_segmentation.ImageSegmentationPipeline"
    keeps = (
        "logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits", "target_size",
        "patch_offsets",
    )  # fmt: skip
    outputs: ClassVar[Mapping[str, str]] = {
        "segments": "list<struct<score, label, mask>>, masks in the picture's size: a PNG, white where it holds, or "
        "struct<size, counts> with mask_format: rle"
    }
    Params = ImageSegmentationParams
    histogram = Histogram("segments", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example({"image": ["street.jpg"]}, {"subtask": "semantic"})

    params: ImageSegmentationParams

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        architectures = (self.model.read_json("config.json") or {}).get("architectures") or []
        for end, loader in LOADERS.items():
            if any(name.endswith(end) for name in architectures):
                self.auto_class = loader

    def options(self) -> dict[str, Any]:
        """Of the params, those that the pipeline takes."""
        options = super().options()
        options.pop("mask_format")
        return options

    def output_fields(self) -> list[pa.Field]:
        """`segments`: a list of structs; `score` is null for semantic ones."""
        mask = mask_type(self.params.mask_format)
        segment = pa.struct([("score", pa.float32()), ("label", pa.string()), ("mask", mask)])
        return [pa.field("segments", pa.list_(segment))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Masks in the format that is asked for."""
        form = self.params.mask_format
        return (
            [{**segment, "mask": pack_mask(np.asarray(segment["mask"]) > 0, form)} for segment in result],
        )

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Segments of each row."""
        return list_lengths(columns[0])
