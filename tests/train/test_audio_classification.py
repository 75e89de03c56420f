"""Training audio-classification: recordings are read as the task reads them, padding and cuts change no loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.models.audio import tiny_wav2vec2
from tests.tasks.audio_files import RATE, chirp, file_of, tone
from tests.train.drive import Bench

TASK, WAV2VEC2 = "audio-classification", "Wav2Vec2ForSequenceClassification"
RECORDINGS = [
    recording(0.2 + 0.05 * k, pitch) for k, (recording, pitch) in enumerate(
        [(tone, 200), (chirp, 300), (tone, 250), (chirp, 350), (tone, 220), (chirp, 400)]
    )
]  # fmt: skip
FILES = [file_of(recording) for recording in RECORDINGS]
LABELS = ["tone", "chirp"] * 3
STILL = {"apply_spec_augment": False, "layerdrop": 0.0, "initializer_range": 0.1}


@pytest.fixture(scope="module", params=["group", "layer"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Wav2Vec2 of either kind: with norms over whole recordings, or with norms of each frame."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_wav2vec2(folder, WAV2VEC2, masks=request.param == "layer", **STILL)


def test_the_loss_is_that_of_transformers_for_each_recording_alone(model: str) -> None:
    bench = Bench(TASK, model, {"audio": FILES, "label": LABELS}).ready()
    bench.model.save_pretrained(Path(model) / "saved")
    plain = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(Path(model) / "saved").eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(model)
    batch = bench.batch()
    losses = [
        plain(**extractor(recording, sampling_rate=RATE, return_tensors="pt"), labels=label[None]).loss
        for recording, label in zip(RECORDINGS, batch["labels"], strict=True)
    ]
    torch.testing.assert_close(bench.loss(batch), torch.stack(losses).mean())


def test_a_step_has_the_same_gradients_however_it_is_cut(model: str) -> None:
    bench = Bench(TASK, model, {"audio": FILES, "label": LABELS}).ready()
    found = []
    for cut in ([[]], [[0], [1, 4, 2], [3, 5]]):
        bench.model.zero_grad()
        for numbers in cut:
            bench.loss(bench.batch(*numbers), len(FILES)).backward()
        found.append(
            {name: weight.grad for name, weight in bench.model.named_parameters() if weight.grad is not None}
        )
    assert any("conv_layers.0" in name for name in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_training_on_rows_improves_the_metrics(model: str) -> None:
    bench = Bench(TASK, model, {"audio": FILES, "label": LABELS}).ready()
    first, last = bench.learn(rate=3e-3)
    assert last < first / 2
    assert bench.metrics()["accuracy"] > 0.9


def test_broken_recordings_are_faults_with_file_and_row(model: str) -> None:
    recordings = [
        FILES[0],
        None,
        b"no sound",
        file_of(np.zeros(0, np.float32)),
        file_of(RECORDINGS[0][:99]),
        FILES[1],
    ]
    faults = (
        Bench(TASK, model, {"audio": recordings, "label": ["a", "b", "a", "b", "b", None]}).validate().faults
    )
    starts = [
        "rows.parquet row 5: label is null",
        "rows.parquet row 1: audio is null",
        "rows.parquet row 2: audio cannot be used: not audio that can be read (8 bytes)",
        "rows.parquet row 3: audio cannot be used: the audio holds no samples",
        "rows.parquet row 4: audio cannot be used: the recording has 99 samples, the model needs 400",
    ]
    assert len(faults) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(faults, starts, strict=True)), faults


def test_recordings_shorter_than_a_mask_of_training_are_padded_to_it(tmp_path: Path) -> None:
    folder = tiny_wav2vec2(tmp_path, WAV2VEC2, masks=True, mask_time_prob=0.5, mask_time_length=10)
    bench = Bench(TASK, folder, {"audio": [file_of(tone(0.05, 200))] * 2, "label": ["a", "b"]}).ready()
    bench.model.train()
    assert torch.isfinite(bench.loss(bench.batch()))


def test_models_over_spectrograms_train_on_the_output_of_their_extractor(tmp_path: Path) -> None:
    small = {"num_mel_bins": 16, "max_length": 40}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.ASTConfig(**small, **sizes).save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(**small).save_pretrained(tmp_path)
    model = {"name": str(tmp_path), "scratch": True}
    bench = Bench(TASK, tmp_path, {"audio": FILES, "label": LABELS}, model=model).ready()
    batch = bench.batch()
    assert batch["input_values"].shape == (6, 40, 16)
    torch.testing.assert_close(bench.loss(batch), bench.model(**batch).loss)
