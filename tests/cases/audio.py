"""Cases of the tasks over sound."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
from transformers import pipeline

from tests.cases.case import Answer, Case, columns_of
from tests.models.audio import tiny_wav2vec2

NAMES = {0: "bell", 1: "rain", 2: "speech"}
RATE = 16_000


def tone(seconds: float, pitch: float, rate: int = RATE) -> np.ndarray:
    """A tone that fades, with a little noise: float32 [samples]."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(int(pitch)).normal(0, 0.02, len(time))
    return (0.5 * np.sin(2 * np.pi * pitch * time) * np.exp(-time) + noise).astype(np.float32)


def file_of(samples: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    """Sound as a file, as exact as the kind allows."""
    target = BytesIO()
    soundfile.write(target, samples, rate, format=kind, **({"subtype": "FLOAT"} if kind == "WAV" else {}))
    return target.getvalue()


SOUNDS = [file_of(tone(0.2 + 0.05 * (k % 5), 100 + 40 * k)) for k in range(22)]


def sound(row: Any) -> np.ndarray:
    """A row's samples."""
    return soundfile.read(BytesIO(row["audio"]), dtype="float32")[0]


def piped(task: str, answer: Callable[[Any], Any], **options: Any) -> Callable[[str], Answer]:
    """The task's pipeline over each recording alone; `answer` makes output columns of what it returns."""

    def load(folder: str) -> Answer:
        pipe = pipeline(task, folder, device="cpu")
        return lambda row: answer(pipe(sound(row), **options))

    return load


def spoken(found: Any) -> dict[str, Any]:
    """A text with its pieces."""
    return {
        "text": found["text"],
        "chunks": [{**one, "timestamp": list(one["timestamp"])} for one in found["chunks"]],
    }


CASES = {
    "audio-classification": Case(
        lambda folder: tiny_wav2vec2(folder, "Wav2Vec2ForSequenceClassification", NAMES),
        {"audio": SOUNDS},
        piped("audio-classification", columns_of, top_k=2),
        {"top_k": 2},
        unreadable=b"this is no sound",
    ),
    "automatic-speech-recognition": Case(
        lambda folder: tiny_wav2vec2(folder, "Wav2Vec2ForCTC"),
        {"audio": SOUNDS},
        piped("automatic-speech-recognition", spoken, return_timestamps="word"),
        {"return_timestamps": "word"},
        unreadable=b"this is no sound",
    ),
}
