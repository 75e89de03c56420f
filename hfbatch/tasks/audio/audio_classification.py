"""Task audio-classification: returns labels and scores of a recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from hfbatch.tasks.audio.audio import AudioLabelTask
from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.labels import score_function


class AudioClassificationParams(Params):
    """Options for the returned labels and scores."""

    top_k: int = Field(default=5, ge=1)
    """Number of labels to return, best first."""
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    """Function applied to logits; null depends on the model's problem type."""


class AudioClassification(AudioLabelTask):
    """Returns the top labels of each recording, with their scores."""

    name = "audio-classification"
    summary = "Labels and scores of a recording"
    auto_class = "AutoModelForAudioClassification"
    pipeline = "audio_classification.AudioClassificationPipeline"
    keeps = ("logits",)
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = AudioClassificationParams
    EXAMPLE = Example({"audio": ["bell.wav", "rain.flac"]}, {"top_k": 2})

    params: AudioClassificationParams

    @property
    def function(self) -> str:
        """Function applied to logits: softmax, sigmoid or none."""
        return self.params.function_to_apply or score_function(self.config)

    def options(self) -> dict[str, Any]:
        """Returns the params; top_k is limited to the model's number of labels."""
        return {**super().options(), "top_k": min(self.params.top_k, self.config.num_labels)}
