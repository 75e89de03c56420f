"""What a case is: a task with a tiny model, twenty rows and more, and transformers' own answer to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image

Row = Mapping[str, Any]
Answer = Callable[[Row], Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """How one task is compared with transformers."""

    build: Callable[[Path], str]
    """Writes a model into a folder and returns the folder."""
    rows: Mapping[str, list[Any]]
    """Task inputs, at least twenty varied rows."""
    oracle: Callable[[str], Answer]
    """Loads the model of a folder; what it returns gives the output columns of one row, computed alone."""
    params: Mapping[str, Any] = field(default_factory=dict)
    unreadable: Any = None
    """A value of the first input that ends as a reject; where any text will do, there is none."""
    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Arrow types of inputs, where their values do not tell."""


def near(got: Any, expected: Any) -> bool:
    """Equal; numbers with a point within 1e-4 of their size, audio within 1e-4, grey levels of images within 1."""
    if isinstance(expected, Mapping):
        return set(got) == set(expected) and all(near(got[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(near, got, expected))
    if isinstance(expected, float | np.floating):
        return abs(got - float(expected)) < 1e-4 * max(1.0, abs(float(expected)))
    if isinstance(expected, bytes) and expected.startswith(b"\x89PNG"):
        one, other = (np.asarray(Image.open(BytesIO(file))).astype(int) for file in (got, expected))
        return one.shape == other.shape and np.abs(one - other).max() <= 1
    if isinstance(expected, bytes) and expected.startswith(b"RIFF"):
        one, other = (soundfile.read(BytesIO(file), dtype="float32")[0] for file in (got, expected))
        return one.shape == other.shape and np.abs(one - other.clip(-1, 1)).max() < 1e-4
    return got == expected


def columns_of(answers: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Labels with scores, as columns."""
    return {name: [one[name] for one in answers] for name in ("label", "score")}
