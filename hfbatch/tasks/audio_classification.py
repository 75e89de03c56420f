"""Task audio-classification: labels and scores of a recording. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.parts.audio import SoundLabelTask


class AudioClassificationParams(Params):
    """Which labels to return, and how scores are made."""

    top_k: int = Field(default=5, ge=1)
    """How many labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """What turns logits into scores; null goes by the model's problem type."""


class AudioClassification(SoundLabelTask):
    """The best labels of each recording, with their scores."""

    name = "audio-classification"
    summary = "Labels and scores of a recording"
    auto_class = "AutoModelForAudioClassification"
    pipeline = "audio_classification.AudioClassificationPipeline"
    keeps = ("logits",)
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = AudioClassificationParams
    EXAMPLE = Example({"audio": ["bell.wav", "rain.flac"]}, {"top_k": 2})

    params: AudioClassificationParams

    def options(self) -> dict[str, Any]:
        """The params; there are no more labels than the model has."""
        return {**super().options(), "top_k": min(self.params.top_k, self.config.num_labels)}
