"""Task mask-generation: returns masks of everything in an image, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Items
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.tokens import list_lengths
from hfbatch.tasks.vision.masks import MaskFormat, decode_mask, encode_mask, from_rle, mask_overlap, mask_type
from hfbatch.tasks.vision.vision import BOX, ImageTask


class MaskGenerationParams(Params):
    """Options for the search for masks and the returned masks."""

    points_per_crop: int = Field(default=32, ge=1)
    """Points per side of the grid; the model is prompted with each point."""
    points_per_batch: int = Field(default=64, ge=1)
    """Points per model call: more are faster, but take more memory."""
    crops_n_layers: int = Field(default=0, ge=0, le=4)
    """Layers of crops to process too: 4 crops in the first layer and four times as many in each further one."""
    crop_overlap_ratio: float = Field(default=512 / 1500, ge=0, lt=1)
    """Overlap of crops in the first layer, as a fraction of the image's shorter side."""
    pred_iou_thresh: float = Field(default=0.88, ge=0, le=1)
    """Masks with a lower predicted IoU are dropped."""
    stability_score_thresh: float = Field(default=0.95, ge=0, le=1)
    """Masks with a lower stability under a shift of the threshold are dropped."""
    stability_score_offset: float = Field(default=1.0, ge=0)
    """Shift of the threshold for the stability score."""
    mask_threshold: float = 0.0
    """Threshold: minimum logit of a pixel that belongs to a mask."""
    crops_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Of two masks whose boxes overlap by more than this (intersection over union), only the better is kept."""
    mask_format: MaskFormat = "png"
    """Format of masks: png, white inside the mask; or rle, COCO's uncompressed run lengths."""


class MaskGeneration(ImageTask):
    """Returns masks of each image, best first."""

    name = "mask-generation"
    summary = "Masks of everything in an image, without labels, by a model such as SAM"
    auto_class = "AutoModelForMaskGeneration"
    pipeline = "hfbatch.tasks.vision.image_pipelines.MaskGenerationPipeline"
    batched = False
    outputs: ClassVar[Mapping[str, str]] = {
        "masks": "list<struct<score, box: struct<xmin, ymin, xmax, ymax>, mask>>, best first, boxes in pixels; "
        "a mask is a PNG, or struct<size, counts> with mask_format: rle"
    }
    Params = MaskGenerationParams
    split_rows = 32
    agreement = Items("masks", "mask", mask_overlap, read=decode_mask)
    histogram = Histogram("masks", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example({"image": ["street.jpg"]}, {"points_per_crop": 16, "mask_format": "rle"})

    params: MaskGenerationParams

    def options(self) -> dict[str, Any]:
        """Returns the params that the pipeline takes."""
        options = super().options()
        options.pop("mask_format")
        return options

    def output_fields(self) -> list[pa.Field]:
        """`masks`: a list of structs; the type of `mask` depends on its format."""
        mask = pa.struct(
            [("score", pa.float32()), ("box", BOX), ("mask", mask_type(self.params.mask_format))]
        )
        return [pa.field("masks", pa.list_(mask))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns masks with named box coordinates."""
        return ([{**one, "box": self._box(one["box"]), "mask": self._mask(one["mask"])} for one in result],)

    def _box(self, sides: list[int]) -> dict[str, int]:
        return dict(zip(BOX.names, sides, strict=True))

    def _mask(self, rle: dict[str, list[int]]) -> Any:
        return rle if self.params.mask_format == "rle" else encode_mask(from_rle(rle), "png")

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of masks in each row."""
        return list_lengths(columns[0])
