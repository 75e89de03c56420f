"""Encodes masks for output columns, as PNG or COCO run lengths."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hfbatch.data.media import to_png

MaskFormat = Literal["png", "rle"]
"""PNG, white inside the mask; or run lengths, which are smaller for large plain masks and need no decoder."""
RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.list_(pa.int32()))])
"""COCO's uncompressed run lengths: height and width; lengths of column-wise runs, the first outside the mask."""


def mask_type(form: MaskFormat) -> pa.DataType:
    """Returns the Arrow type of a mask."""
    return pa.binary() if form == "png" else RLE


def encode_mask(mask: np.ndarray, form: MaskFormat) -> Any:
    """Converts a mask to a value of `mask_type`. :param mask: bool [height, width]."""
    from PIL import Image

    return to_png(Image.fromarray(mask.astype(np.uint8) * 255)) if form == "png" else to_rle(mask)


def decode_mask(value: Any) -> np.ndarray:
    """The reverse of `encode_mask`: bool [height, width]. Returns a decoded one unchanged."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        return value
    return from_rle(value) if isinstance(value, dict) else np.asarray(Image.open(io.BytesIO(value))) > 0


def mask_overlap(a: Any, b: Any) -> float:
    """Returns the intersection over union of two masks, encoded or decoded; 0 for two empty ones, and for those of different sizes."""
    one, other = decode_mask(a), decode_mask(b)
    union = np.logical_or(one, other).sum() if one.shape == other.shape else 0
    return float(np.logical_and(one, other).sum() / union) if union else 0.0


def box_overlap(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Returns the intersection over union of two boxes, structs of `xmin`, `ymin`, `xmax`, `ymax`; 0 for two empty ones."""
    width = min(a["xmax"], b["xmax"]) - max(a["xmin"], b["xmin"])
    height = min(a["ymax"], b["ymax"]) - max(a["ymin"], b["ymin"])
    both = max(width, 0) * max(height, 0)
    union = sum((box["xmax"] - box["xmin"]) * (box["ymax"] - box["ymin"]) for box in (a, b)) - both
    return both / union if union else 0.0


def to_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Returns the run lengths of a mask, bool [height, width]."""
    flat = mask.ravel(order="F")
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *turns, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[:1].any() else counts}


def from_rle(rle: dict[str, list[int]]) -> np.ndarray:
    """The reverse of `to_rle`: bool [height, width]."""
    counts = rle["counts"]
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(rle["size"], order="F")


def distinct(boxes: np.ndarray, scores: np.ndarray, most: float) -> np.ndarray:
    """Greedy non-maximum suppression: indices of boxes that overlap no better box by more than `most`, best first.

    Source: torchvision.ops.nms, with the same results.

    :param boxes: xmin, ymin, xmax, ymax: float32 [boxes, 4].
    :param scores: float32 [boxes].
    :param most: maximum intersection over union.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-scores, kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(boxes[best, 2:], boxes[left, 2:]) - np.maximum(boxes[best, :2], boxes[left, :2])
        shared = sides.clip(0).prod(axis=1)
        # An empty box overlaps nothing, though 0 / 0 is NaN.
        left = left[~(shared > most * (areas[best] + areas[left] - shared))]
    return np.array(kept, np.int64)
