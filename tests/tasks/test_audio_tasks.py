"""Tasks over audio give their pipeline's answers, whatever file the audio came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soxr
from transformers import pipeline

from hfbatch.data.media import to_audio
from hfbatch.data.media_files import RowFiles
from hfbatch.runtime.prepare import preprocess
from hfbatch.tasks import task_class
from hfbatch.tasks.generation.sampling import row_seeds
from tests.models.audio import tiny_clap, tiny_spectrogram_transformer, tiny_wav2vec2
from tests.tasks.audio_files import RATE, file_of, tone
from tests.tasks.drive import features_of, make, run

NAMES = {0: "bell", 1: "rain", 2: "speech"}
RECORDINGS = [tone(0.2 + 0.05 * (k % 5), 100 + 40 * k) for k in range(12)]
LENGTHS = [tone(0.3 + 0.007 * (k % 7), 100 + 40 * k) for k in range(12)]
"""Recordings of which some are padded to the length of others."""


def test_audio_classification(tmp_path: Path) -> None:
    folder = tiny_wav2vec2(tmp_path, "Wav2Vec2ForSequenceClassification", NAMES)
    task = make(task_class("audio-classification"), folder, top_k=9)
    assert task.check() == []
    found = run(task, {"audio": [file_of(recording) for recording in RECORDINGS]}).to_pylist()
    oracle = pipeline("audio-classification", folder, device="cpu", top_k=3)
    for got, recording in zip(found, RECORDINGS, strict=True):
        expected = oracle(recording)
        assert got["label"] == [one["label"] for one in expected]
        np.testing.assert_allclose(got["score"], [one["score"] for one in expected], atol=1e-4)


@pytest.mark.parametrize("masks", [False, True], ids=["group-norm", "layer-norm"])
@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat"])
def test_padding_does_not_change_scores(tmp_path: Path, family: str, masks: bool) -> None:
    folder = tiny_wav2vec2(tmp_path, f"{family}ForSequenceClassification", NAMES, masks=masks)
    task = make(task_class("audio-classification"), folder)
    assert task.masks
    files = {"audio": [file_of(recording) for recording in LENGTHS]}
    found, alone = (run(task, files, size).to_pylist() for size in (8, 1))
    oracle = pipeline("audio-classification", folder, device="cpu")
    for together, by_itself, recording in zip(found, alone, LENGTHS, strict=True):
        expected = oracle(recording)
        assert together["label"] == by_itself["label"] == [one["label"] for one in expected]
        scores = [one["score"] for one in expected]
        np.testing.assert_allclose(by_itself["score"], scores, atol=1e-5)
        np.testing.assert_allclose(together["score"], scores, atol=1e-4)
    assert len({round(row["score"][0], 3) for row in found}) > 5


def test_audio_comes_in_many_files(tmp_path: Path) -> None:
    recording = tone(0.5, 440)
    (tmp_path / "a.wav").write_bytes(file_of(recording))
    stereo = np.stack([recording, 0.5 * recording], axis=1)
    exact = [
        file_of(recording), "a.wav", str(tmp_path / "a.wav"), {"bytes": file_of(recording), "path": None},
        {"bytes": None, "path": "a.wav"}, {"array": recording.tolist(), "sampling_rate": RATE},
    ]  # fmt: skip
    for value in exact:
        np.testing.assert_array_equal(to_audio(value, RATE, RowFiles(str(tmp_path))), recording)
    np.testing.assert_allclose(to_audio(file_of(stereo), RATE), 0.75 * recording, atol=1e-6)
    np.testing.assert_allclose(
        to_audio({"array": stereo.T, "sampling_rate": RATE}, RATE), 0.75 * recording, atol=1e-6
    )
    np.testing.assert_allclose(to_audio(file_of(recording, kind="FLAC"), RATE), recording, atol=1e-4)
    for kind in ("OGG", "MP3"):
        read = to_audio(file_of(recording, kind=kind), RATE)
        assert abs(len(read) - len(recording)) < RATE / 10
    high = tone(0.5, 440, 44_100)
    np.testing.assert_array_equal(to_audio(file_of(high, 44_100), RATE), soxr.resample(high, 44_100, RATE))


def test_what_is_no_audio_is_an_error(tmp_path: Path) -> None:
    task = make(
        task_class("audio-classification"), tiny_wav2vec2(tmp_path, "Wav2Vec2ForSequenceClassification")
    )
    with pytest.raises(ValueError, match="not audio"):
        features_of(task, {"audio": [b"RIFF of nothing"]})
    with pytest.raises(ValueError, match="no samples"):
        features_of(task, {"audio": pa.array([{"array": [], "sampling_rate": RATE}])})


def test_what_a_spectrogram_transformer_truncates_is_counted(tmp_path: Path) -> None:
    folder = tiny_spectrogram_transformer(tmp_path, NAMES)
    task = make(task_class("audio-classification"), folder)
    recordings = [tone(0.4, 100 + 30 * k) for k in range(10)] + [tone(0.6, 900), tone(0.495, 440)]
    files = {"audio": [file_of(recording) for recording in recordings]}
    assert features_of(task, files).truncated == 1
    oracle = pipeline("audio-classification", folder, device="cpu")
    expected = [oracle(recording) for recording in recordings]
    assert len({one[0]["score"] for one in expected}) > 5
    for got, want in zip(run(task, files).to_pylist(), expected, strict=True):
        assert got["label"] == [one["label"] for one in want]
        np.testing.assert_allclose(got["score"], [one["score"] for one in want], atol=1e-4)


@pytest.mark.parametrize("fusion", [False, True], ids=["a part", "whole and parts"])
def test_zero_shot_audio_classification(tmp_path: Path, fusion: bool) -> None:
    folder = tiny_clap(tmp_path, fusion)
    labels = ["the engineer", "a quiet river before dawn", "what the model said"]
    options = {"candidate_labels": labels, "hypothesis_template": "a word of {}"}
    task = make(task_class("zero-shot-audio-classification"), folder, **options)
    assert task.check() == []
    recordings = [tone(0.3 + 0.15 * k, 100 + 110 * k) for k in range(12)]
    files = {"audio": [file_of(recording) for recording in recordings]}
    assert features_of(task, files).truncated == 7
    oracle = pipeline("zero-shot-audio-classification", folder, device="cpu")
    seeds = row_seeds(
        0, pa.table({"file": ["rows.parquet"] * len(recordings), "row": range(len(recordings))})
    )
    expected = []
    for recording, seed in zip(recordings, seeds.tolist(), strict=True):
        np.random.seed(seed % 2**32)
        expected.append(oracle(recording, **options))
    assert len({tuple(one["label"] for one in row) for row in expected}) > 1
    for got, want in zip(run(task, files).to_pylist(), expected, strict=True):
        assert got["label"] == [one["label"] for one in want]
        np.testing.assert_allclose(got["score"], [one["score"] for one in want], atol=1e-4)


def test_a_template_needs_a_place_for_the_label(tmp_path: Path) -> None:
    options = {"candidate_labels": ["rain"], "hypothesis_template": "a sound"}
    task = make(task_class("zero-shot-audio-classification"), tiny_clap(tmp_path), **options)
    assert "no {} for the label" in task.check()[0]


@pytest.mark.parametrize("name", ["audio-classification", "zero-shot-audio-classification"])
def test_the_examples_run(tmp_path: Path, name: str) -> None:
    kind = task_class(name)
    if name.startswith("zero"):
        folder = tiny_clap(tmp_path / "model")
    else:
        folder = tiny_wav2vec2(tmp_path / "model", "Wav2Vec2ForSequenceClassification", NAMES)
    for file in kind.EXAMPLE.rows["audio"]:
        (tmp_path / file).write_bytes(file_of(RECORDINGS[0], kind=Path(file).suffix[1:].upper()))
    task = make(kind, folder, files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params)
    rows = run(task, kind.EXAMPLE.rows).to_pylist()
    assert [len(row["label"]) for row in rows] == [2, 2]
    assert list(rows[0]) == list(kind.outputs)


STEREO = np.stack([tone(0.5, 440), tone(0.5, 660)], axis=1)
BAD_AUDIO: dict[str, tuple[Any, str]] = {
    "no bytes": (b"", "0 bytes"),
    "text": (b"The train leaves at ten.", "not audio that can be read"),
    "a cut header": (file_of(RECORDINGS[0])[:20], "not audio that can be read"),
    "a WAV without samples": (file_of(np.zeros(0, np.float32)), "no samples"),
    "NaN": (file_of(np.array([0.1, np.nan] * 4000, np.float32)), "not finite"),
    "infinity": (file_of(np.array([0.1, np.inf] * 4000, np.float32)), "not finite"),
    "two samples": (file_of(RECORDINGS[0][:2]), "2 samples, the model needs 400"),
}


@pytest.mark.parametrize("masks", [False, True], ids=["group-norm", "layer-norm"])
@pytest.mark.parametrize("name", ["audio-classification", "automatic-speech-recognition"])
def test_bad_audio_is_a_reject_with_its_reason_and_the_rest_is_done(
    tmp_path: Path, name: str, masks: bool
) -> None:
    architecture = "Wav2Vec2ForCTC" if name.startswith("auto") else "Wav2Vec2ForSequenceClassification"
    task = make(task_class(name), tiny_wav2vec2(tmp_path, architecture, masks=masks))
    good = [
        file_of(RECORDINGS[0]),
        file_of(tone(0.5, 440, 8_000), 8_000),
        file_of(tone(0.5, 440, 96_000), 96_000),
    ]
    good.append(file_of(STEREO))
    values = [good[0], *(value for value, _ in BAD_AUDIO.values()), *good[1:]]
    places = pa.table({"file": ["rows.parquet"] * len(values), "row": range(len(values))})
    prepared = preprocess(task, {"audio": pa.array(values, pa.binary())}, places)
    reasons = {reject.position: reject.message for reject in prepared.rejects}
    assert sorted(reasons) == list(range(1, len(BAD_AUDIO) + 1))
    for position, (_, words) in enumerate(BAD_AUDIO.values(), start=1):
        assert words in reasons[position]
        assert " object at " not in reasons[position]
    assert prepared.features["hfbatch_position"].to_pylist() == [0, *range(len(BAD_AUDIO) + 1, len(values))]
    assert len(run(task, {"audio": good})) == len(good)


@pytest.mark.parametrize("rate", [8_000, 96_000])
def test_audio_of_any_rate_is_resampled_to_the_rate_of_the_model(rate: int) -> None:
    """A tone keeps its pitch and its length."""
    time = np.arange(rate) / rate
    decoded = to_audio(file_of(0.5 * np.sin(2 * np.pi * 440 * time), rate), RATE)
    assert len(decoded) == RATE
    np.testing.assert_allclose(
        decoded[400:-400], 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[400:-400], atol=2e-3
    )
