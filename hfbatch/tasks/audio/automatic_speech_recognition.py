"""Task automatic-speech-recognition: transcribes a recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.agreement import Texts
from hfbatch.tasks.audio.audio import AudioTask, width_of
from hfbatch.tasks.base import Example, Histogram, Params, TaskConfig
from hfbatch.tasks.generation.generation_config import read_defaults
from hfbatch.tasks.pipelines.pipeline import Inputs

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig


CHUNKS = pa.list_(pa.struct([("text", pa.string()), ("timestamp", pa.list_(pa.float32()))]))
AUTO_CLASSES = {
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForTDT": "MODEL_FOR_TDT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""AutoClasses of speech models, and transformers' mappings of model types for each."""
WHISPER_ONLY = ("language", "task")
GENERATION = (*WHISPER_ONLY, "max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")
"""Params for models that generate token by token; a CTC model has one token per frame."""
PROMPT_TOKENS = 4
"""Maximum tokens of Whisper's prompt: start, language, task and timestamps."""
TRIAL_TOKENS = 8


class SpeechRecognitionParams(Params):
    """Options for windows over long recordings, timestamps and text generation."""

    chunk_length_s: float | None = Field(default=None, gt=0)
    """Length in seconds of windows over a long recording; null disables windows."""
    stride_length_s: float | None = Field(default=None, ge=0)
    """Overlap in seconds of a window with each neighbor; null is a sixth of the window."""
    return_timestamps: Literal["word", "char"] | bool | None = None
    """Also return chunks with timestamps: word or char for CTC models, true (segments) or word for Whisper."""
    language: str | None = None
    """Spoken language, such as en or english, for Whisper; null detects it for each recording."""
    task: Literal["transcribe", "translate"] | None = None
    """Task of Whisper: transcribe, or translate into English."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens per recording or window; null uses the model's setting, else 256. Not for CTC models."""
    num_beams: int | None = Field(default=None, ge=1)
    """Number of beams; null uses the model's setting, else 5, as in transformers. Not for CTC models."""
    length_penalty: float | None = None
    """Above 0 favors longer texts in beam search, below 0 shorter ones. Not for CTC models."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    """N-grams of this size occur only once; 0 disables the rule. Not for CTC models."""


class SpeechRecognition(AudioTask):
    """Transcribes each recording, optionally with timestamps."""

    name = "automatic-speech-recognition"
    summary = "Transcript of a recording, optionally with timestamps, by a model such as Whisper or Wav2Vec2"
    auto_class = "AutoModelForCTC"
    pipeline = "automatic_speech_recognition.AutomaticSpeechRecognitionPipeline"
    outputs: ClassVar[Mapping[str, str]] = {
        "text": "string",
        "chunks": "list<struct<text, timestamp>>, start and end in seconds; only with return_timestamps",
    }
    Params = SpeechRecognitionParams
    agreement = Texts("text")
    histogram = Histogram("characters", (0.0, *(float(2**k) for k in range(16))))
    EXAMPLE = Example({"audio": ["call.wav"]}, {"return_timestamps": "word"})

    params: SpeechRecognitionParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        kind = (self.model.read_json("config.json") or {}).get("model_type")
        self.auto_class = auto_class_of(kind)
        self.is_whisper = kind == "whisper"
        self.generates = self.auto_class != "AutoModelForCTC"
        self.concurrent = not self.generates
        # Word timestamps come from attention that Whisper scales over all steps of the batch, and a transducer
        # continues to generate in rows that end before others.
        words = self.is_whisper and self.params.return_timestamps == "word"
        self.batched = not words and self.auto_class != "AutoModelForTDT"

    @cached_property
    def defaults(self) -> GenerationConfig:
        """The model's generation settings."""
        return read_defaults(self.model, self.config)

    @property
    def window(self) -> float:
        """Length of Whisper's input window in seconds."""
        return float(self.processors["feature_extractor"].chunk_length)

    def options(self) -> dict[str, Any]:
        """Returns the params, with those of generation grouped; text is never sampled."""
        options = super().options()
        generation = {name: options.pop(name) for name in GENERATION if name in options}
        if self.generates:
            options["generate_kwargs"] = {**generation, "do_sample": False}
        return options

    def check(self) -> list[str]:
        """Returns errors for params that the model does not use, and for unknown values."""
        useless = () if self.is_whisper else WHISPER_ONLY if self.generates else GENERATION
        given = [f"params.{name}" for name in useless if getattr(self.params, name) is not None]
        faults = [f"{', '.join(given)}: model {self.model.name!r} does not use it; leave it out"] * bool(
            given
        )
        refused = super().check()
        faults += refused
        if not refused and self.is_whisper:
            faults += whisper_faults(self.params, self.defaults, self.config.max_target_positions)
        return faults + self._window_faults(bool(refused))

    def _window_faults(self, refused: bool) -> list[str]:
        """Returns errors for windows and their overlap. :param refused: whether the model has other errors already."""
        window, shared = self.params.chunk_length_s, self.params.stride_length_s
        if window is None:
            return ["params.stride_length_s has no effect without params.chunk_length_s"] * (
                shared is not None
            )
        faults = []
        if shared is not None and 2 * shared >= window:
            faults.append(
                f"params.stride_length_s {shared:g} on both sides leaves nothing of a window of {window:g} seconds; "
                f"set less than {window / 2:g}"
            )
        if self.is_whisper and not refused and window > self.window:
            faults.append(
                f"params.chunk_length_s {window:g} is more than the {self.window:g} seconds of "
                f"model {self.model.name!r}'s input window; set at most {self.window:g}"
            )
        return faults

    def notes(self) -> list[str]:
        """Returns notes on defaults."""
        if not self.is_whisper or self.params.chunk_length_s or self._reads_on:
            return []
        return [f"recordings of more than {self.window:g} seconds are rejected (params.chunk_length_s)"]

    @property
    def _reads_on(self) -> bool:
        """Whether Whisper processes long recordings sequentially, by its predicted timestamps."""
        return bool(self.params.return_timestamps or getattr(self.defaults, "return_timestamps", False))

    def output_fields(self) -> list[pa.Field]:
        """`text`, and `chunks` if requested."""
        fields = [pa.field("text", pa.string())]
        return fields + ([pa.field("chunks", CHUNKS)] if self.params.return_timestamps else [])

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields recordings. :raises ValueError: for a recording longer than Whisper's input window."""
        bounded = self.is_whisper and not self.params.chunk_length_s and not self._reads_on
        for samples in super().rows(columns):
            if bounded and len(samples) > self.window * self.rate:
                raise ValueError(
                    f"the recording has {len(samples) / self.rate:.1f} seconds, the model takes at most "
                    f"{self.window:g}; set params.return_timestamps: true, or params.chunk_length_s: {self.window:g}"
                )
            yield samples

    def is_padded(self, step: Mapping[str, Any]) -> bool:
        """Whether a step may be padded: also true if Whisper processes it sequentially, up to the end of its mask."""
        if self.is_whisper:
            return width_of(step) > self.processors["feature_extractor"].nb_max_frames
        return super().is_padded(step)

    def kin_of(self, step: Mapping[str, Any]) -> Any:
        """Returns only names for steps that Whisper processes sequentially, since finished rows leave the batch."""
        return tuple(step) if self.is_whisper and self.is_padded(step) else super().kin_of(step)

    def compute(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Returns the tokens of each step, with its position in the recording."""
        import torch

        inputs = self.together(rows)
        if "stride" in inputs:
            inputs["stride"] = [row["stride"] for row in rows]
        made = pipe.forward(inputs, **pipe._forward_params)
        if len(rows) > 1 and self.is_padded(rows[0]) and not self.generates:
            samples = torch.tensor([width_of(row) for row in rows])
            frames = pipe.model._get_feat_extract_output_lengths(samples).tolist()
        else:
            frames = [made["tokens"].shape[-1]] * len(rows)
        return [
            {
                **made,
                "is_last": row["is_last"],
                "tokens": made["tokens"][k : k + 1, : frames[k]],
                **({"stride": made["stride"][k]} if "stride" in made else {}),
            }
            for k, row in enumerate(rows)
        ]

    @cached_property
    def _brief(self) -> SpeechRecognition:
        """The same task with a limit of a few tokens."""
        params = self.params.model_copy(update={"max_new_tokens": TRIAL_TOKENS})
        return type(self)(replace(self.settings, params=params))

    def trial_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates the first few tokens."""
        return self._brief.forward(model, batch) if self.generates else self.forward(model, batch)

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns the text, and its chunks."""
        pieces = [{**one, "timestamp": list(one["timestamp"])} for one in result.get("chunks", [])]
        return (result["text"], pieces) if self.params.return_timestamps else (result["text"],)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of characters in each row's text."""
        return np.array([len(text) for text in columns[0].to_pylist()])


def auto_class_of(model_type: str | None) -> str:
    """Returns the AutoClass of a model type; that of CTC models for unknown types."""
    from transformers.models.auto import modeling_auto

    tables = {name: getattr(modeling_auto, table) for name, table in AUTO_CLASSES.items()}
    return next((name for name, table in tables.items() if model_type in table), "AutoModelForCTC")


def whisper_faults(params: SpeechRecognitionParams, defaults: GenerationConfig, positions: int) -> list[str]:
    """Returns errors for options that a Whisper model does not support.

    :param defaults: the model's generation_config.json.
    :param positions: maximum tokens that it can generate, prompt included.
    """
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    faults = []
    known = getattr(defaults, "lang_to_id", {})
    english = not getattr(defaults, "is_multilingual", bool(known)) or not known
    if english and (params.language or params.task):
        faults.append("params.language and params.task are for models of several languages; leave them out")
    elif params.language is not None:
        language = params.language.lower()
        code = language if language in known else f"<|{TO_LANGUAGE_CODE.get(language, language)}|>"
        if code not in known:
            codes = ", ".join(sorted(token.strip("<|>") for token in known))
            faults.append(
                f"params.language {params.language!r} is not a language of the model; choose one of: {codes}"
            )
    if params.return_timestamps and not hasattr(defaults, "no_timestamps_token_id"):
        faults.append("params.return_timestamps needs a no_timestamps_token_id in generation_config.json")
    if params.return_timestamps == "word" and not hasattr(defaults, "alignment_heads"):
        faults.append(
            "params.return_timestamps word needs alignment_heads in generation_config.json; set true"
        )
    if params.max_new_tokens and params.max_new_tokens + PROMPT_TOKENS > positions:
        faults.append(
            f"params.max_new_tokens {params.max_new_tokens} is more than the model's maximum; "
            f"set at most {positions - PROMPT_TOKENS}"
        )
    return faults
