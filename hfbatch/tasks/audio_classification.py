"""Task audio-classification: labels and scores of a recording. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.audio import AudioTask
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.text import flatten


class AudioClassificationParams(Params):
    """Which labels to return, and how scores are made."""

    top_k: int = Field(default=5, ge=1)
    """How many labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """What turns logits into scores; null goes by the model's problem type."""


class AudioClassification(AudioTask):
    """The best labels of each recording, with their scores."""

    name = "audio-classification"
    summary = "Labels and scores of a recording"
    auto_class = "AutoModelForAudioClassification"
    pipeline = "audio_classification.AudioClassificationPipeline"
    keeps = ("logits",)
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = AudioClassificationParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"audio": ["bell.wav", "rain.flac"]}, {"top_k": 2})

    params: AudioClassificationParams

    def options(self) -> dict[str, Any]:
        """The params; there are no more labels than the model has."""
        return {**super().options(), "top_k": min(self.params.top_k, self.config.num_labels)}

    def output_fields(self) -> list[pa.Field]:
        """`label` and `score`, lists of one length."""
        return [pa.field("label", pa.list_(pa.string())), pa.field("score", pa.list_(pa.float32()))]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Labels and scores apart."""
        return [one["label"] for one in result], [one["score"] for one in result]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        scores = flatten(columns[1])
        return scores.values.to_numpy()[scores.offsets.to_numpy()[:-1]]
