"""How alike two vectors, texts or images are, and how large a change is beside the spread of the values."""

from __future__ import annotations

import io
import re
from difflib import SequenceMatcher
from typing import Any

import numpy as np

NEIGHBOURS = 10
"""Nearest rows that are compared for each row."""
LONG = 2000
"""Characters of two texts from which words are compared: the time grows with the square of the number of pieces."""
WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u9fff]+\s*|.", re.DOTALL)
"""A word with the space behind it, or a character of a script without spaces."""
ROUNDING = 1e-6
"""Spread of values, relative to their size, up to which they are constant in float32."""


def change_by_spread(reference: np.ndarray, found: np.ndarray) -> float:
    """Returns the mean change of values, or the mean length of the change of vectors, divided by `spread`.

    :param reference: float64 [values] or [vectors, width], as found.
    """
    change = found - reference
    return float((np.abs(change) if change.ndim == 1 else np.linalg.norm(change, axis=1)).mean()) / spread(
        reference
    )


def spread(values: np.ndarray) -> float:
    """Returns the standard deviation of values or vectors. Constant ones have none: their size takes its place, and 1 that of zeros.

    :param values: float64 [values] or [vectors, width], at least one.
    """
    rows = values.reshape(len(values), -1)
    deviation = float(np.sqrt(np.square(rows - rows.mean(0)).sum(1).mean()))
    size = float(np.sqrt(np.square(rows).sum(1).mean()))
    return deviation if deviation > ROUNDING * size else size or 1.0


def numbers(value: Any) -> np.ndarray:
    """Returns nested lists of numbers as one vector."""
    if value and isinstance(value[0], list):
        return np.concatenate([numbers(one) for one in value])
    return np.array(value or [], np.float64)


def vectors(value: Any) -> list[np.ndarray]:
    """Returns the innermost lists of nested lists of numbers."""
    if value and isinstance(value[0], list):
        return [vector for one in value for vector in vectors(one)]
    return [np.array(value or [], np.float64)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the cosine similarity; 1 for two vectors of zeros, 0 for vectors of different sizes."""
    if a.shape != b.shape:
        return 0.0
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else float(np.array_equal(a, b))


def similarity(a: str, b: str) -> float:
    """Returns the share of characters in common blocks, of whole words in long texts, which take too long otherwise."""
    one, other = ([*a], [*b]) if len(a) + len(b) < LONG else (WORD.findall(a), WORD.findall(b))
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    common = sum(len("".join(one[block.a : block.a + block.size])) for block in blocks)
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def neighbour_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the share of the nearest rows by cosine that both have, over all rows. float64 [rows, width]."""
    nearest = []
    for rows in (a, b):
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        near = unit @ unit.T
        np.fill_diagonal(near, -2)
        nearest.append(np.argpartition(-near, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    shared = [len(set(one) & set(other)) for one, other in zip(*nearest, strict=True)]
    return float(np.mean(shared)) / NEIGHBOURS


def pixels(value: Any) -> np.ndarray:
    """Returns an image file, or nested lists, as numbers."""
    if not isinstance(value, bytes):
        return np.array(value, np.float64)
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(value)), np.float64)
