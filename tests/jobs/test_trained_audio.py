"""Models that are trained here and now do their tasks on held-out recordings, through all steps of the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.jobs.tools import predict
from tests.models.audio import tiny_wav2vec2
from tests.tasks.sounds import RATE, file_of

KINDS = {0: "low tone", 1: "high tone", 2: "rising tone", 3: "noise"}
SMALL: dict[str, Any] = {"masks": True, "initializer_range": 0.05, "mask_time_prob": 0.0, "layerdrop": 0.0}


def train(model: Any, steps: int, batch: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Trains a model on batches that are made up as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    torch.manual_seed(0)
    model.train()
    for _ in range(steps):
        model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def recording(kind: int, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A sound of a kind, at a pitch and a loudness of its own, with noise in the background: float32 [samples]."""
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = random.uniform(150, 400) if kind in (0, 2) else random.uniform(2000, 4000)
    if kind == 3:
        sound = random.normal(0, 0.5, len(time))
    elif kind == 2:
        sound = np.sin(2 * np.pi * pitch * time * (1 + 8 * time))
    else:
        sound = np.sin(2 * np.pi * pitch * time)
    return (random.uniform(0.2, 0.8) * sound + random.normal(0, 0.02, len(time))).astype(np.float32)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Wav2Vec2 of four kinds of sound."""
    folder = tiny_wav2vec2(
        tmp_path_factory.mktemp("kinds"), "Wav2Vec2ForSequenceClassification", KINDS, **SMALL
    )
    model = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(folder)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    random = np.random.default_rng(0)

    def batch() -> dict[str, torch.Tensor]:
        labels = random.integers(0, len(KINDS), 16)
        sounds = [recording(int(label), 0.3, random) for label in labels]
        inputs = extractor(sounds, sampling_rate=RATE, return_tensors="pt")
        return {**inputs, "labels": torch.from_numpy(labels)}

    train(model, 150, batch)
    model.save_pretrained(folder)
    return folder


def test_held_out_recordings_of_other_lengths_are_told_apart(
    classifier: str, tmp_path: Path, ray_cluster: str
) -> None:
    random = np.random.default_rng(1)
    kinds = random.integers(0, len(KINDS), 80)
    sounds = [recording(int(kind), random.uniform(0.25, 0.6), random) for kind in kinds]
    columns = {"audio": map(file_of, sounds)}
    found = predict("audio-classification", classifier, tmp_path, columns, ray_cluster)["label"].to_pylist()
    right = [labels[0] == KINDS[int(kind)] for labels, kind in zip(found, kinds, strict=True)]
    assert np.mean(right) >= 0.9
