"""A small Wav2Vec2, fine-tuned here on recordings that are made up, distinguishes others that it was not trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.models.audio import tiny_wav2vec2
from tests.tasks.audio_files import RATE, file_of
from tests.train.tools import train_and_predict

KINDS = {0: "low tone", 1: "high tone", 2: "rising tone", 3: "noise"}
HELD_OUT = 80


def recording(kind: int, random: np.random.Generator) -> np.ndarray:
    """A sound of a kind, at a length, pitch and loudness of its own, with noise in the background: float32 [samples]."""
    time = np.arange(int(random.uniform(0.2, 0.5) * RATE)) / RATE
    pitch = random.uniform(150, 400) if kind in (0, 2) else random.uniform(2000, 4000)
    if kind == 3:
        sound = random.normal(0, 0.5, len(time))
    elif kind == 2:
        sound = np.sin(2 * np.pi * pitch * time * (1 + 8 * time))
    else:
        sound = np.sin(2 * np.pi * pitch * time)
    return (random.uniform(0.2, 0.8) * sound + random.normal(0, 0.02, len(time))).astype(np.float32)


@pytest.mark.timeout(200)
def test_held_out_recordings_are_distinguished(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    kinds = random.integers(0, len(KINDS), 560).tolist()
    sounds = [file_of(recording(kind, random)) for kind in kinds]
    rows = pa.table({"audio": sounds, "label": [KINDS[kind] for kind in kinds]})
    model = tiny_wav2vec2(
        tmp_path / "new", "Wav2Vec2ForSequenceClassification", masks=True, initializer_range=0.05,
        apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    metrics, found = train_and_predict(
        "audio-classification", {"name": model}, tmp_path, rows[HELD_OUT:], rows[:HELD_OUT],
        batch={"size": 16}, schedule={"epochs": 3, "learning_rate": 3e-3},
    )  # fmt: skip
    best = [labels[0] for labels in found["label"].to_pylist()]
    right = np.array(best) == rows["label"].to_pylist()[:HELD_OUT]
    assert right.mean() >= 0.9
    assert right.mean() == pytest.approx(metrics["best"]["accuracy"])
