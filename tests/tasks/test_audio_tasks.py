"""Tasks over sound give their pipeline's answers, whatever file the sound came in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soxr
from transformers import pipeline

from hfbatch.data.media import to_sound
from hfbatch.tasks import task_class
from tests.models.audio import tiny_wav2vec2
from tests.tasks.drive import features_of, make, run
from tests.tasks.sounds import RATE, file_of, tone

NAMES = {0: "bell", 1: "rain", 2: "speech"}
SOUNDS = [tone(0.2 + 0.05 * (k % 5), 100 + 40 * k) for k in range(21)]
LENGTHS = [tone(0.3 + 0.007 * (k % 7), 100 + 40 * k) for k in range(21)]
"""Recordings of which some are padded to the length of others."""


@pytest.mark.parametrize("size", [1, 8])
def test_audio_classification(tmp_path: Path, size: int) -> None:
    folder = tiny_wav2vec2(tmp_path, "Wav2Vec2ForSequenceClassification", NAMES)
    task = make(task_class("audio-classification"), folder, top_k=9)
    assert task.check() == []
    found = run(task, {"audio": [file_of(sound) for sound in SOUNDS]}, size).to_pylist()
    oracle = pipeline("audio-classification", folder, device="cpu", top_k=3)
    for got, sound in zip(found, SOUNDS, strict=True):
        expected = oracle(sound)
        assert got["label"] == [one["label"] for one in expected]
        np.testing.assert_allclose(got["score"], [one["score"] for one in expected], atol=1e-4)


@pytest.mark.parametrize("masks", [False, True], ids=["group-norm", "layer-norm"])
@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat"])
def test_padding_does_not_change_scores(tmp_path: Path, family: str, masks: bool) -> None:
    folder = tiny_wav2vec2(tmp_path, f"{family}ForSequenceClassification", NAMES, masks=masks)
    task = make(task_class("audio-classification"), folder)
    assert task.masks
    files = {"audio": [file_of(sound) for sound in LENGTHS]}
    found, alone = (run(task, files, size).to_pylist() for size in (8, 1))
    oracle = pipeline("audio-classification", folder, device="cpu")
    for together, by_itself, sound in zip(found, alone, LENGTHS, strict=True):
        expected = oracle(sound)
        assert together["label"] == by_itself["label"] == [one["label"] for one in expected]
        scores = [one["score"] for one in expected]
        np.testing.assert_allclose(by_itself["score"], scores, atol=1e-5)
        np.testing.assert_allclose(together["score"], scores, atol=1e-4)
    assert len({round(row["score"][0], 3) for row in found}) > 5


def test_sound_comes_in_many_files(tmp_path: Path) -> None:
    sound = tone(0.5, 440)
    (tmp_path / "a.wav").write_bytes(file_of(sound))
    stereo = np.stack([sound, 0.5 * sound], axis=1)
    exact = [
        file_of(sound), "a.wav", str(tmp_path / "a.wav"), {"bytes": file_of(sound), "path": None},
        {"bytes": None, "path": "a.wav"}, {"array": sound.tolist(), "sampling_rate": RATE},
    ]  # fmt: skip
    for value in exact:
        np.testing.assert_array_equal(to_sound(value, RATE, str(tmp_path)), sound)
    np.testing.assert_allclose(to_sound(file_of(stereo), RATE), 0.75 * sound, atol=1e-6)
    np.testing.assert_allclose(
        to_sound({"array": stereo.T, "sampling_rate": RATE}, RATE), 0.75 * sound, atol=1e-6
    )
    np.testing.assert_allclose(to_sound(file_of(sound, kind="FLAC"), RATE), sound, atol=1e-4)
    for kind in ("OGG", "MP3"):
        read = to_sound(file_of(sound, kind=kind), RATE)
        assert abs(len(read) - len(sound)) < RATE / 10
    high = tone(0.5, 440, 44_100)
    np.testing.assert_array_equal(to_sound(file_of(high, 44_100), RATE), soxr.resample(high, 44_100, RATE))


def test_what_is_no_sound_is_an_error(tmp_path: Path) -> None:
    task = make(
        task_class("audio-classification"), tiny_wav2vec2(tmp_path, "Wav2Vec2ForSequenceClassification")
    )
    with pytest.raises(ValueError, match="not a sound"):
        features_of(task, {"audio": [b"RIFF of nothing"]})
    with pytest.raises(ValueError, match="no samples"):
        features_of(task, {"audio": pa.array([{"array": [], "sampling_rate": RATE}])})
