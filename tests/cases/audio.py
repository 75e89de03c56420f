"""Cases of the tasks over audio."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import pipeline

from tests.cases.case import Answer, Case, columns_of
from tests.models.audio import tiny_clap, tiny_vits, tiny_wav2vec2
from tests.tasks.audio_files import file_of, tone

NAMES = {0: "bell", 1: "rain", 2: "speech"}


RECORDINGS = [file_of(tone(0.2 + 0.05 * (k % 5), 100 + 40 * k)) for k in range(22)]


def recording(row: Any) -> np.ndarray:
    """A row's samples."""
    return soundfile.read(BytesIO(row["audio"]), dtype="float32")[0]


def piped(task: str, answer: Callable[[Any], Any], **options: Any) -> Callable[[str], Answer]:
    """The task's pipeline over each recording alone; `answer` makes output columns of what it returns."""

    def load(folder: str) -> Answer:
        pipe = pipeline(task, folder, device="cpu")
        return lambda row: answer(pipe(recording(row), **options))

    return load


def spoken(found: Any) -> dict[str, Any]:
    """A text with its pieces."""
    return {
        "text": found["text"],
        "chunks": [{**one, "timestamp": list(one["timestamp"])} for one in found["chunks"]],
    }


def still_vits(folder: Path) -> str:
    """A VITS without noise: only then is its audio the same whatever has been drawn before."""
    tiny_vits(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "noise_scale": 0.0, "noise_scale_duration": 0.0})
    )
    return str(folder)


def text_to_audio(folder: str) -> Answer:
    pipe = pipeline("text-to-audio", folder, device="cpu")

    def answer(row: Any) -> dict[str, Any]:
        made = pipe(row["text"])
        return {
            "audio": file_of(made["audio"].T, made["sampling_rate"]),
            "sampling_rate": made["sampling_rate"],
        }

    return answer


LABELS = ["the engineer", "a quiet river before dawn", "what the model said"]

CASES = {
    "audio-classification": Case(
        lambda folder: tiny_wav2vec2(folder, "Wav2Vec2ForSequenceClassification", NAMES),
        {"audio": RECORDINGS},
        piped("audio-classification", columns_of, top_k=2),
        {"top_k": 2},
        unreadable=b"this is no sound",
    ),
    "automatic-speech-recognition": Case(
        lambda folder: tiny_wav2vec2(folder, "Wav2Vec2ForCTC"),
        {"audio": RECORDINGS},
        piped("automatic-speech-recognition", spoken, return_timestamps="word"),
        {"return_timestamps": "word"},
        unreadable=b"this is no sound",
    ),
    "zero-shot-audio-classification": Case(
        tiny_clap,
        {"audio": [file_of(tone(0.2 + 0.03 * k, 100 + 70 * k)) for k in range(24)]},
        piped("zero-shot-audio-classification", columns_of, candidate_labels=LABELS),
        {"candidate_labels": LABELS},
        unreadable=b"this is no sound",
    ),
    "text-to-audio": Case(
        still_vits,
        {
            "text": [
                f"{word} number {chr(97 + k)}."
                for k in range(8)
                for word in ("train", "a quiet river", "gap")
            ]
        },
        text_to_audio,
    ),
}
