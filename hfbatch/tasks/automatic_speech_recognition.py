"""Task automatic-speech-recognition: what is said in a recording. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.audio import AudioTask

CHUNKS = pa.list_(pa.struct([("text", pa.string()), ("timestamp", pa.list_(pa.float32()))]))


class SpeechRecognitionParams(Params):
    """How long recordings are read, and whether to say when each piece is spoken."""

    chunk_length_s: float | None = Field(default=None, gt=0)
    """Seconds of the windows that a long recording is cut into; null reads it whole."""
    stride_length_s: float | None = Field(default=None, ge=0)
    """Seconds that a window shares with each of its neighbours; null is a sixth of the window."""
    return_timestamps: Literal["word", "char"] | None = None
    """Also return words or characters with their seconds."""


class SpeechRecognition(AudioTask):
    """The text of each recording, and when its pieces are spoken."""

    name = "automatic-speech-recognition"
    summary = "What is said in a recording, and when, by a CTC model such as Wav2Vec2"
    auto_class = "AutoModelForCTC"
    pipeline = "automatic_speech_recognition.AutomaticSpeechRecognitionPipeline"
    outputs: ClassVar[Mapping[str, str]] = {
        "text": "string",
        "chunks": "list<struct<text, timestamp>>, seconds of begin and end; only with return_timestamps",
    }
    Params = SpeechRecognitionParams
    histogram = Histogram("characters", (0.0, *(float(2**k) for k in range(16))))
    EXAMPLE = Example({"audio": ["call.wav"]}, {"return_timestamps": "word"})

    params: SpeechRecognitionParams

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Windows and seconds are told apart by what each row passes on, which one call has for one row alone.
        self.batched = self.params.chunk_length_s is None and self.params.return_timestamps is None

    def output_fields(self) -> list[pa.Field]:
        """`text`, and `chunks` where they are asked for."""
        fields = [pa.field("text", pa.string())]
        return fields + ([pa.field("chunks", CHUNKS)] if self.params.return_timestamps else [])

    def answer(self, result: Any) -> tuple[Any, ...]:
        """The text, and its pieces."""
        pieces = [{**one, "timestamp": list(one["timestamp"])} for one in result.get("chunks", [])]
        return (result["text"], pieces) if self.params.return_timestamps else (result["text"],)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Characters of each row's text."""
        return np.array([len(text) for text in columns[0].to_pylist()])
