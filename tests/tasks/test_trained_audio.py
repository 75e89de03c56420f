"""A model that is trained here and now tells held-out recordings apart, through the task and all its steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from hfbatch.tasks import task_class
from tests.models.audio import tiny_wav2vec2
from tests.tasks.drive import make, run
from tests.tasks.sounds import RATE, file_of

KINDS = {0: "low tone", 1: "high tone", 2: "rising tone", 3: "noise"}
STEPS, BATCH, SECONDS = 150, 16, 0.3


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
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Wav2Vec2 of four kinds of sound."""
    folder = tiny_wav2vec2(
        tmp_path_factory.mktemp("trained"), "Wav2Vec2ForSequenceClassification", KINDS, masks=True,
        initializer_range=0.05, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(folder).train()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(STEPS):
        labels = random.integers(0, len(KINDS), BATCH)
        sounds = [recording(int(label), SECONDS, random) for label in labels]
        inputs = extractor(sounds, sampling_rate=RATE, return_tensors="pt")
        loss = model(**inputs, labels=torch.from_numpy(labels)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


def test_held_out_recordings_of_other_lengths_are_told_apart(trained: str) -> None:
    random = np.random.default_rng(1)
    kinds = random.integers(0, len(KINDS), 80)
    sounds = [recording(int(kind), random.uniform(0.25, 0.6), random) for kind in kinds]
    task = make(task_class("audio-classification"), trained, top_k=1)
    found = run(task, {"audio": [file_of(sound) for sound in sounds]}, 8)["label"].to_pylist()
    right = [labels == [KINDS[int(kind)]] for labels, kind in zip(found, kinds, strict=True)]
    assert np.mean(right) >= 0.9
