"""Task any-to-any: generates text from images and audio with a prompt or a chat."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from hfbatch.data.media import is_audio_like, to_audio
from hfbatch.tasks.audio.audio import AUDIO
from hfbatch.tasks.base import Example, InputColumn
from hfbatch.tasks.multimodal.media_prompts import is_media
from hfbatch.tasks.multimodal.multimodal_generation import IMAGES, MESSAGES, PromptedTask
from hfbatch.tasks.tokens import text_column

AUDIOS = InputColumn(
    "audio", is_media(is_audio_like), f"{AUDIO.wants}, or a list of them", required=False, files=True
)


class AnyToAny(PromptedTask):
    """Continues the prompt of `text` about `image` and `audio`, or answers the chat of `messages` with them in it.

    A prompt marks the position of each image and recording with the model's placeholder, such as `<|AUDIO|>`. A chat
    is rendered with the processor's chat template; if it ends with an assistant message, that message is continued.
    Recordings longer than the model's limit are truncated and counted.
    """

    name = "any-to-any"
    summary = "Text generated from images and audio with a prompt or a chat, by a model such as Qwen2-Audio"
    auto_class = "AutoModelForMultimodalLM"
    pipeline = "hfbatch.tasks.pipelines.replacements.AnyPromptPipeline"
    inputs = (IMAGES, AUDIOS, text_column("text", required=False), MESSAGES)
    media: ClassVar[tuple[str, ...]] = ("image", "audio")
    EXAMPLE = Example(
        {"audio": ["call.wav"], "messages": [[{"role": "user", "content": "What is said?"}]]},
        {"max_new_tokens": 32},
    )

    @cached_property
    def model_class(self) -> type[Any] | None:
        """The class that loads the model; None for a model with custom code."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

        return MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(self.config), None)

    @property
    def readable(self) -> tuple[str, ...]:
        """The media types that the model takes."""
        known = getattr(self.model_class, "input_modalities", self.media)
        return tuple(kind for kind in self.media if kind in known)

    def check(self) -> list[str]:
        """Returns errors for a model of another task, a model that outputs more than text, and contradictory params."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as NAMES

        from hfbatch.tasks.pipelines.replacements import architecture_faults

        fits = set(NAMES.values()) - {"VisionEncoderDecoderModel"}
        faults = architecture_faults(self, fits, "one such as Qwen2-Audio or LLaVA")
        if faults:
            return faults
        more = sorted(set(getattr(self.model_class, "output_modalities", ())) - {"text"})
        if more:
            return [
                f"model {self.model.name!r} outputs {' and '.join(more)} too; use one that outputs only text, "
                "such as the thinker of a Qwen-Omni"
            ]
        return super().check()

    def column_faults(self, present: set[str]) -> list[str]:
        """Also returns an error for media that the model does not take."""
        strange = [kind for kind in self.media if kind in present and kind not in self.readable]
        if strange:
            return [
                f"model {self.model.name!r} takes {', '.join(('text', *self.readable))}, not {' and '.join(strange)}; "
                "choose another model, or rename the column"
            ]
        return super().column_faults(present)

    def open_audio(self, value: Any) -> np.ndarray:
        """Decodes a recording: float32 [samples] at the model's sampling rate."""
        extractor = self.processors["processor"].feature_extractor
        return to_audio(value, int(extractor.sampling_rate), self.files)

    @property
    def openers(self) -> dict[str, Any]:
        """Maps each media type that the model takes to its decoder."""
        known = {"image": self.open_image, "audio": self.open_audio}
        return {kind: known[kind] for kind in self.readable}

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether a recording is longer than the model's limit."""
        extractor = getattr(self.processors["processor"], "feature_extractor", None)
        most = getattr(extractor, "n_samples", None)
        return most is not None and any(len(audio) > most for audio in _audios(row))


def _audios(row: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yields the decoded recordings of a row."""
    yield from row.get("audio", [])
    for message in row.get("messages", []):
        parts = message["content"] if isinstance(message["content"], list) else []
        yield from (part["audio"] for part in parts if part["type"] == "audio")
