"""Task mask-generation: masks of everything that a picture shows, without labels. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.masks import MaskFormat, from_rle, mask_type, pack_mask
from hfbatch.tasks.parts.text import list_lengths
from hfbatch.tasks.parts.vision import BOX, ImageTask


class MaskGenerationParams(Params):
    """Where to look for masks, and which to return."""

    points_per_crop: int = Field(default=32, ge=1)
    """Points on each side of the grid; the model is asked what lies at each point."""
    points_per_batch: int = Field(default=64, ge=1)
    """Points that run together: more are faster, and take more memory."""
    crops_n_layers: int = Field(default=0, ge=0, le=4)
    """Also look at crops of the picture, 4 in the first layer and four times as many in each further one."""
    crop_overlap_ratio: float = Field(default=512 / 1500, ge=0, lt=1)
    """Share of the picture's shorter side by which crops of the first layer overlap."""
    pred_iou_thresh: float = Field(default=0.88, ge=0, le=1)
    """Masks that the model scores lower are left out."""
    stability_score_thresh: float = Field(default=0.95, ge=0, le=1)
    """Masks that change more than this allows when the cutoff is moved are left out."""
    stability_score_offset: float = Field(default=1.0, ge=0)
    """How far the cutoff is moved for that."""
    mask_threshold: float = 0.0
    """The cutoff: from which logit on a pixel belongs to a mask."""
    crops_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Of two masks whose boxes overlap by more than this (intersection over union) the better one is kept."""
    mask_format: MaskFormat = "png"
    """How masks are written: png, white where the mask holds; or rle, COCO's uncompressed run lengths."""


class MaskGeneration(ImageTask):
    """Masks of what each picture shows, best first."""

    name = "mask-generation"
    summary = "Masks of everything in a picture, without labels, by a model such as SAM"
    auto_class = "AutoModelForMaskGeneration"
    pipeline = "hfbatch.tasks.parts.pictures.MaskGenerationPipeline"
    batched = False
    outputs: ClassVar[Mapping[str, str]] = {
        "masks": "list<struct<score, box: struct<xmin, ymin, xmax, ymax>, mask>>, best first, boxes in pixels; "
        "a mask is a PNG, or struct<size, counts> with mask_format: rle"
    }
    Params = MaskGenerationParams
    split_rows = 32
    histogram = Histogram("masks", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example({"image": ["street.jpg"]}, {"points_per_crop": 16, "mask_format": "rle"})

    params: MaskGenerationParams

    def options(self) -> dict[str, Any]:
        """Of the params, those that the pipeline takes."""
        options = super().options()
        options.pop("mask_format")
        return options

    def output_fields(self) -> list[pa.Field]:
        """`masks`: a list of structs; the type of `mask` goes by its format."""
        mask = pa.struct(
            [("score", pa.float32()), ("box", BOX), ("mask", mask_type(self.params.mask_format))]
        )
        return [pa.field("masks", pa.list_(mask))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Masks with the sides of their boxes by name."""
        return ([{**one, "box": self._box(one["box"]), "mask": self._mask(one["mask"])} for one in result],)

    def _box(self, sides: list[int]) -> dict[str, int]:
        return dict(zip(BOX.names, sides, strict=True))

    def _mask(self, rle: dict[str, list[int]]) -> Any:
        return rle if self.params.mask_format == "rle" else pack_mask(from_rle(rle), "png")

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Masks of each row."""
        return list_lengths(columns[0])
