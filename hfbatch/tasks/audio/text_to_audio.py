"""Task text-to-audio: generates speech or music from a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_wav
from hfbatch.tasks.base import Batch, Example, Features, Histogram, InputColumn, Params, TaskConfig
from hfbatch.tasks.pipelines.pipeline import Inputs, PipelineTask
from hfbatch.tasks.tokens import text_column

SPEECHT5 = "speecht5"
GENERATION = ("max_new_tokens", "do_sample", "temperature", "guidance_scale")
"""Params for models that generate token by token."""


def is_vector(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of floating-point numbers."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in lists) and pa.types.is_floating(kind.value_type)


class TextToAudioParams(Params):
    """Options for the voice and for audio generation. Null uses the values in the model's files."""

    vocoder: str | None = None
    """Folder or Hub name of the HiFi-GAN vocoder, which is required for SpeechT5."""
    speaker_id: int | None = Field(default=None, ge=0)
    """Speaker of a multi-speaker VITS model."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum steps of a generative model such as MusicGen; the length of a step depends on the model."""
    do_sample: bool | None = None
    """Whether a generative model samples its steps, seeded for each row, or takes the most probable."""
    temperature: float | None = Field(default=None, gt=0)
    """Randomness of sampled steps: above 1 more, below 1 less."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """Classifier-free guidance scale of MusicGen: how closely it follows the text; 1 disables guidance."""


class TextToAudio(PipelineTask):
    """Generates a recording for each text.

    Random numbers depend only on the job's seed and the row's position: rows run one by one, each with its own seed.
    """

    name = "text-to-audio"
    summary = "Speech or music from a text, by a model such as VITS, SpeechT5, Bark or MusicGen"
    aliases = ("text-to-speech",)
    auto_class = "AutoModelForTextToWaveform"
    pipeline = "text_to_audio.TextToAudioPipeline"
    inputs = (
        text_column("text"),
        InputColumn("speaker_embeddings", is_vector, "list<float>: the voice, for SpeechT5", required=False),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "audio": "binary: a WAV file of 16 bits",
        "sampling_rate": "int32, samples per second",
    }
    batched = False
    concurrent = False  # the seed is global to the process
    split_rows = 128
    Params = TextToAudioParams
    histogram = Histogram("seconds", (0.0, *(2.0**k for k in range(-3, 10))))
    EXAMPLE = Example({"text": ["The train leaves at ten.", "Please mind the gap."]})

    params: TextToAudioParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        self.needs_vocoder = (self.model.read_json("config.json") or {}).get("model_type") == SPEECHT5
        if self.needs_vocoder:
            self.auto_class = "AutoModelForTextToSpectrogram"

    @cached_property
    def limit(self) -> int | None:
        """None: the pipeline truncates no text."""
        return None

    def options(self) -> dict[str, Any]:
        """Returns the params, grouped by the step that takes them."""
        given = {name: value for name, value in self.params.model_dump().items() if value is not None}
        options: dict[str, Any] = {}
        if generation := {name: given[name] for name in GENERATION if name in given}:
            options["generate_kwargs"] = generation
        if "speaker_id" in given:
            options["forward_params"] = {"speaker_id": given["speaker_id"]}
        return options

    def over(self, model: Any) -> Any:
        """Returns the pipeline over a model and its vocoder."""
        options = self.options()
        if self.needs_vocoder:
            options["vocoder"] = self._vocoder(model)
        return self.kind(model=model, task=self.name, device=model.device, **self.processors, **options)

    def _vocoder(self, model: Any) -> Any:
        """Loads the vocoder on the model's device; without weights for a model without weights."""
        import transformers

        kind = transformers.SpeechT5HifiGan
        if self.params.vocoder is None:
            raise ValueError("it needs params.vocoder, such as microsoft/speecht5_hifigan")
        if model.device.type == "meta":
            return kind(transformers.SpeechT5HifiGanConfig.from_pretrained(self.params.vocoder)).to("meta")
        vocoder = kind.from_pretrained(self.params.vocoder, dtype=model.dtype, use_safetensors=True)
        return vocoder.eval().requires_grad_(False).to(model.device)

    def check(self) -> list[str]:
        """Returns errors for params that the model does not use, and for missing ones."""
        faults = super().check()
        if faults:
            return faults
        useless = [] if self.skeleton.model.can_generate() and not self.needs_vocoder else [*GENERATION]
        useless += [] if self.needs_vocoder else ["vocoder"]
        speakers = int(getattr(self.config, "num_speakers", 1) or 1)
        if speakers == 1:
            useless.append("speaker_id")
        elif (self.params.speaker_id or 0) >= speakers:
            faults.append(
                f"params.speaker_id {self.params.speaker_id} is not one of the model's {speakers} speakers; "
                f"set at most {speakers - 1}"
            )
        given = [f"params.{name}" for name in useless if getattr(self.params, name) is not None]
        if given:
            faults.append(f"{', '.join(given)}: model {self.model.name!r} does not use it; leave it out")
        return faults

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error if SpeechT5 has no column of voices."""
        if self.needs_vocoder and "speaker_embeddings" not in present:
            return ["SpeechT5 needs a column speaker_embeddings, list<float>: the voice of each row"]
        return []

    def output_fields(self) -> list[pa.Field]:
        """`audio` and `sampling_rate`."""
        return [pa.field("audio", pa.binary()), pa.field("sampling_rate", pa.int32())]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Texts."""
        yield from columns["text"].to_pylist()

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text; adds the row's seed."""
        from hfbatch.tasks.generation.sampling import row_seeds

        made = super().preprocess(columns, places)
        table = made.table.append_column("seed", pa.array(row_seeds(self.seed, places), pa.int64()))
        if self.needs_vocoder:
            voices = columns["speaker_embeddings"].cast(pa.list_(pa.float32()))
            table = table.append_column("speaker_embeddings", voices)
        return Features(table, made.cut)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns the rows' model inputs, seeds and voices."""
        import torch

        batch = super().collate(features, rows, multiple)
        extra = features.drop_columns(["inputs", "cost"]).take(pa.array(rows)).to_pylist()
        for steps, row in zip(batch["rows"], extra, strict=True):
            steps[0]["seed"] = row["seed"]
            if self.needs_vocoder:
                steps[0]["speaker_embeddings"] = torch.tensor([row["speaker_embeddings"]])
        return batch

    def _run(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Generates the audio of one row, with its own seed."""
        import torch

        (row,) = rows
        devices = [pipe.device] if pipe.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(row.pop("seed"))
            made = pipe.forward(row, **pipe._forward_params)
        return [_audio_of(made)]

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Returns a WAV file, and its sampling rate."""
        return to_wav(result["audio"], result["sampling_rate"]), result["sampling_rate"]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the length of each recording in seconds."""
        import soundfile

        return np.array([soundfile.info(BytesIO(file)).duration for file in columns[0].to_pylist()])


def _audio_of(made: Any) -> dict[str, Any]:
    """Returns the model output that the pipeline converts to audio, with its name."""
    if not isinstance(made, Mapping):
        return {"audio": made}
    name = next(name for name in ("audio", "waveform", "sequences") if name in made)
    return {name: made[name]}
