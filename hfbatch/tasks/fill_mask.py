"""Task fill-mask: the likeliest tokens in place of a mask. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.pipeline import TextPipelineTask
from hfbatch.tasks.parts.text import flatten

FILLED = pa.struct(
    [("score", pa.float32()), ("token", pa.int32()), ("token_str", pa.string()), ("sequence", pa.string())]
)


class FillMaskParams(Params):
    """Which tokens to return."""

    top_k: int = Field(default=5, ge=1)
    """How many tokens to return for each mask, best first."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Choose among these words alone; each has to be one token of the model."""


class FillMask(TextPipelineTask):
    """The likeliest tokens for each mask in a text."""

    name = "fill-mask"
    summary = "The likeliest tokens in place of a mask"
    auto_class = "AutoModelForMaskedLM"
    pipeline = "fill_mask.FillMaskPipeline"
    keeps = ("logits", "input_ids")
    outputs: ClassVar[Mapping[str, str]] = {
        "fills": "list over masks of list<struct<score, token, token_str, sequence>>, best first"
    }
    Params = FillMaskParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"text": ["Paris is the [MASK] of France.", "A [MASK] and a [MASK]."]}, {"top_k": 2})

    params: FillMaskParams

    def options(self) -> dict[str, Any]:
        """The params, and long texts are cut."""
        return {**super().options(), "tokenizer_kwargs": {"truncation": True}}

    def output_fields(self) -> list[pa.Field]:
        """`fills`: for each mask of the row, the tokens that the pipeline returns."""
        return [pa.field("fills", pa.list_(pa.list_(FILLED)))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """One list for each mask, also where there is a single one."""
        return (result if result and isinstance(result[0], list) else [result],)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best token for the first mask of each row."""
        return np.array([row[0][0]["score"] for row in flatten(columns[0]).to_pylist()])
