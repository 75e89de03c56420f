"""Task image-segmentation: returns masks of the segments of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Items
from hfbatch.tasks.base import Example, Histogram, Params, TaskConfig
from hfbatch.tasks.tokens import list_lengths
from hfbatch.tasks.vision.masks import MaskFormat, decode_mask, encode_mask, mask_overlap, mask_type
from hfbatch.tasks.vision.vision import ImageTask

LOADERS = {
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ForInstanceSegmentation": "AutoModelForUniversalSegmentation",
    "ForUniversalSegmentation": "AutoModelForUniversalSegmentation",
}
"""AutoClasses of models that the default AutoClass does not load, by the end of the model's class name."""


class ImageSegmentationParams(Params):
    """Options for segments; null uses the pipeline's default."""

    subtask: Literal["panoptic", "instance", "semantic"] | None = None
    """panoptic, instance or semantic segmentation; null selects the first that the model supports."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Segments with a lower score are dropped."""
    mask_threshold: float | None = Field(default=None, ge=0, le=1)
    """Minimum value of a pixel that belongs to a mask."""
    overlap_mask_area_threshold: float | None = Field(default=None, ge=0, le=1)
    """Parts of a mask smaller than this fraction of it are dropped."""
    mask_format: MaskFormat = "png"
    """Format of masks: png, white inside the mask; or rle, COCO's uncompressed run lengths."""


class ImageSegmentation(ImageTask):
    """Returns segmentation masks of each image."""

    name = "image-segmentation"
    summary = "Segmentation masks of an image: panoptic, instance or semantic"
    auto_class = "AutoModelForImageSegmentation"
    pipeline = "image_segmentation.ImageSegmentationPipeline"
    keeps = (
        "logits", "pred_boxes", "pred_masks", "class_queries_logits", "masks_queries_logits", "target_size",
        "patch_offsets",
    )  # fmt: skip
    outputs: ClassVar[Mapping[str, str]] = {
        "segments": "list<struct<score, label, mask>>, masks at the image's size: a PNG, white inside the mask, or "
        "struct<size, counts> with mask_format: rle"
    }
    Params = ImageSegmentationParams
    agreement = Items("segments", "mask", mask_overlap, read=decode_mask)
    histogram = Histogram("segments", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example({"image": ["street.jpg"]}, {"subtask": "semantic"})

    params: ImageSegmentationParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        architectures = (self.model.read_json("config.json") or {}).get("architectures") or []
        for end, loader in LOADERS.items():
            if any(name.endswith(end) for name in architectures):
                self.auto_class = loader

    def options(self) -> dict[str, Any]:
        """Returns the params that the pipeline takes."""
        options = super().options()
        options.pop("mask_format")
        return options

    def output_fields(self) -> list[pa.Field]:
        """`segments`: a list of structs; `score` is null for semantic segmentation."""
        mask = mask_type(self.params.mask_format)
        segment = pa.struct([("score", pa.float32()), ("label", pa.string()), ("mask", mask)])
        return [pa.field("segments", pa.list_(segment))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Converts masks to the requested format."""
        form = self.params.mask_format
        return (
            [{**segment, "mask": encode_mask(np.asarray(segment["mask"]) > 0, form)} for segment in result],
        )

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of segments in each row."""
        return list_lengths(columns[0])
