"""Stores vectors in fewer bytes: float16, 8-bit integers, or one bit for each dimension.

Source: sentence_transformers.util.quantization.quantize_embeddings, whose results these equal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
STORED: dict[str, pa.DataType] = {
    "float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "uint8": pa.uint8(),
    "binary": pa.int8(), "ubinary": pa.uint8(),
}  # fmt: skip
"""The type of a stored number."""
FEWEST = 100
"""Vectors below which the range of a single dimension is not known; sentence-transformers warns below them too."""


def needs_ranges(precision: str) -> bool:
    """Returns whether numbers are stored by their place in the range of their dimension."""
    return precision.endswith("int8")


def stored_type(precision: str, dimension: int) -> pa.DataType:
    """Returns the type of a stored vector: a fixed-size list, for binary of dimension / 8 numbers with eight bits each."""
    return pa.list_(STORED[precision], -(-dimension // 8) if precision.endswith("binary") else dimension)


def fit_ranges(vectors: np.ndarray, common: bool = False) -> list[list[float]]:
    """Returns the minimum and the maximum of each dimension.

    :param vectors: float32 [vectors, dimension].
    :param common: give all dimensions the same range around 0, which keeps the order of dot products. It needs few vectors;
        fewer than FEWEST get it in any case.
    :raises ValueError: if there are none.
    """
    if not vectors.size:
        raise ValueError(
            "no row of the first split has a vector from which to take ranges; set params.ranges"
        )
    low, high = vectors.min(0), vectors.max(0)
    if common or len(vectors) < FEWEST:
        high = np.full_like(high, np.abs(vectors).max())
        low = -high
    return [low.tolist(), high.tolist()]


def store(vectors: np.ndarray, precision: str, ranges: list[list[float]] | None = None) -> np.ndarray:
    """Returns vectors as they are stored.

    :param vectors: float32 [vectors, dimension].
    :param ranges: minimum and maximum of each dimension, for int8 and uint8; numbers outside are stored as the nearest.
    :raises ValueError: for numbers that float16 cannot hold, and if ranges are missing.
    """
    if precision == "float32":
        return vectors
    if precision == "float16":
        with np.errstate(over="ignore"):
            half = vectors.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError("the vector has a number above 65504, which float16 cannot hold; use float32")
        return half
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ 128).view(np.int8)
    if ranges is None:
        raise ValueError(f"precision {precision} has no ranges yet; set params.ranges")
    low, high = np.asarray(ranges, np.float32)
    step = (high - low) / np.float32(255)
    levels = np.floor((vectors - low) / np.where(step == 0, np.float32(1), step)).clip(0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
