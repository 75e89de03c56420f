"""Speech recognition gives what the unbatched pipeline gives for each recording, however rows are batched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import pipeline

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from hfbatch.tasks.audio.automatic_speech_recognition import SpeechRecognition
from tests.models.audio import tiny_moonshine, tiny_parakeet, tiny_wav2vec2, tiny_whisper
from tests.tasks.audio_files import chirp, file_of
from tests.tasks.drive import features_of, load, make, measured, run

SHORT = [chirp(0.2 + 0.05 * (k % 5), 100 + 140 * k) for k in range(12)]
"""Recordings for CTC models, some of one length."""
WINDOW = [chirp(0.3 + 0.13 * k, 100 + 60 * k) for k in range(12)]
"""Recordings that a Whisper of two seconds hears whole."""
LONG = [chirp(2.1 + 0.8 * k, 100 + 60 * k) for k in range(4)]
"""Recordings of several windows."""
GREEDY = {"num_beams": 1}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


def task_of(folder: str, **params: Any) -> SpeechRecognition:
    return make(task_class("automatic-speech-recognition"), folder, **params)


def assert_equal_to_pipeline(
    folder: str, recordings: list[np.ndarray], params: dict[str, Any], generate: dict[str, Any] | None = None
) -> None:
    """Batches of 1 and of 8 give the texts and pieces of the pipeline for one recording at a time."""
    task = task_of(folder, **params, **(generate or {}))
    assert task.check() == []
    options = {**params, "generate_kwargs": generate} if generate else params
    oracle = pipeline("automatic-speech-recognition", folder, device="cpu", **options)
    expected = [oracle(recording.copy()) for recording in recordings]
    assert len({one["text"] for one in expected}) > min(5, len(recordings) - 1)
    found = run(task, {"audio": [file_of(recording) for recording in recordings]}).to_pylist()
    assert [one["text"] for one in found] == [one["text"] for one in expected]
    for got, want in zip(found, expected, strict=True):
        assert ("chunks" in got) == ("chunks" in want)
        pieces = got.get("chunks", [])
        assert [piece["text"] for piece in pieces] == [piece["text"] for piece in want.get("chunks", [])]
        for piece, known in zip(pieces, want.get("chunks", []), strict=True):
            times = np.array(known["timestamp"], float)  # the end of the last piece may be open
            np.testing.assert_allclose(np.array(piece["timestamp"], float), times, atol=1e-4)


CTC_OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "words": {"return_timestamps": "word"},
    "characters": {"return_timestamps": "char"},
    "windows": {"chunk_length_s": 0.2, "stride_length_s": 0.04},
    "windows-of-words": {"chunk_length_s": 0.2, "return_timestamps": "word"},
}


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Models without and with masks."""
    folder = tmp_path_factory.mktemp("ctc")
    return {
        masks: tiny_wav2vec2(folder / str(masks), "Wav2Vec2ForCTC", seed=1, masks=masks)
        for masks in (False, True)
    }


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("whole", False), ("whole", True), ("words", True), ("characters", False), ("windows", False),
        ("windows", True), ("windows-of-words", True),
    ],
)  # fmt: skip
def test_a_ctc_model_gives_the_text_of_each_recording(ctc: dict[bool, str], name: str, masks: bool) -> None:
    assert_equal_to_pipeline(ctc[masks], SHORT, CTC_OPTIONS[name])


def test_recordings_of_different_lengths_share_a_batch_where_a_mask_hides_the_padding(tmp_path: Path) -> None:
    recordings = {"audio": [file_of(chirp(0.2 + 0.004 * k, 100 + k)) for k in range(8)]}
    folder = tiny_wav2vec2(tmp_path / "masks", "Wav2Vec2ForCTC")
    assert sorted(batches_of(task_of(folder), recordings)) == [1, 2, 5]
    adapted = tiny_wav2vec2(tmp_path / "adapter", "Wav2Vec2ForCTC", add_adapter=True, output_hidden_size=32)
    assert sorted(batches_of(task_of(adapted), recordings)) == [1] * 8


def batches_of(task: SpeechRecognition, columns: dict[str, list[bytes]]) -> list[int]:
    """Rows of each call of the encoder, where the task is given all rows as one batch."""
    features = features_of(task, columns).table
    model = load(task)
    rows: list[int] = []
    encoder = model.get_encoder() if task.generates else model.wav2vec2.encoder
    encoder.register_forward_hook(lambda module, inputs, outputs: rows.append(len(outputs[0])))
    task.forward(model, task.collate(features, np.arange(len(features)), 1))
    return rows


WHISPER_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": ({}, {}),
    "segments": ({"return_timestamps": True}, GREEDY),
    "words": ({"return_timestamps": "word"}, GREEDY),
    "windows": ({"chunk_length_s": 0.8, "return_timestamps": True}, GREEDY),
    "translation": ({}, {**GREEDY, "language": "de", "task": "translate"}),
    "limits": ({}, {"num_beams": 2, "max_new_tokens": 9, "length_penalty": 0.5, "no_repeat_ngram_size": 2}),
}


@pytest.mark.parametrize(("params", "generate"), WHISPER_OPTIONS.values(), ids=WHISPER_OPTIONS)
def test_whisper_gives_the_text_of_each_recording(
    whisper: str, params: dict[str, Any], generate: dict[str, Any]
) -> None:
    assert_equal_to_pipeline(whisper, WINDOW, params, generate)


@pytest.mark.parametrize(
    "params",
    [
        {"return_timestamps": True},
        {"chunk_length_s": 2, "stride_length_s": 0.5},
        {"return_timestamps": "word"},
    ],
    ids=["segments", "windows", "words"],
)
def test_whisper_reads_long_recordings(whisper: str, params: dict[str, Any]) -> None:
    assert_equal_to_pipeline(whisper, LONG, params, GREEDY)


@pytest.mark.parametrize(
    ("build", "generate"),
    [(tiny_moonshine, {"num_beams": 2, "max_new_tokens": 9}), (tiny_parakeet, {"max_new_tokens": 20})],
    ids=["moonshine", "parakeet"],
)
def test_other_models_that_generate_give_the_text_of_each_recording(
    tmp_path: Path, build: Callable[[Path], str], generate: dict[str, Any]
) -> None:
    recordings = [chirp(0.5 + 0.05 * (k % 5), 100 + 140 * k) for k in range(12)]
    assert_equal_to_pipeline(build(tmp_path), recordings, {}, generate)


def test_whisper_runs_a_batch_at_once(whisper: str) -> None:
    task = task_of(whisper, language="en", **GREEDY)
    assert batches_of(task, {"audio": [file_of(recording) for recording in WINDOW[:8]]})[0] == 8


def test_a_batch_of_whisper_has_recordings_of_like_length(whisper: str) -> None:
    task = task_of(whisper, **GREEDY)
    features = features_of(task, {"audio": [file_of(recording) for recording in WINDOW]}).table
    lengths = task.lengths(features)
    assert (np.diff(lengths) > 0).all()
    assert lengths[-1] < 200


def test_what_is_too_long_for_whisper_says_what_to_set(whisper: str) -> None:
    with pytest.raises(ValueError, match=r"2\.1 seconds.*return_timestamps: true.*chunk_length_s: 2"):
        features_of(task_of(whisper), {"audio": [file_of(LONG[0])]})


def test_a_recording_shorter_than_a_frame_is_an_error_in_any_batch(tmp_path: Path) -> None:
    task = task_of(tiny_wav2vec2(tmp_path, "Wav2Vec2ForCTC", masks=True))
    with pytest.raises(ValueError, match="399 samples, the model needs 400"):
        features_of(task, {"audio": [file_of(SHORT[0]), file_of(SHORT[1][:399])]})
    assert run(task, {"audio": [file_of(SHORT[0][:400])]}).num_rows == 1


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown language": ({"language": "klingon"}, "klingon.*choose one of: de, en"),
    "known to others": ({"language": "french"}, "french.*choose one of: de, en"),
    "characters": ({"return_timestamps": "char"}, "cannot return `char`"),
    "window": ({"chunk_length_s": 3}, "3 is more than the 2 seconds"),
    "stride": ({"chunk_length_s": 1, "stride_length_s": 0.5}, "less than 0.5"),
    "stride alone": ({"stride_length_s": 0.5}, "no effect without params.chunk_length_s"),
    "tokens": ({"max_new_tokens": 61}, "set at most 60"),
}


@pytest.mark.parametrize(("params", "words"), FAULTS.values(), ids=FAULTS)
def test_params_that_whisper_cannot_do_are_faults(whisper: str, params: dict[str, Any], words: str) -> None:
    faults = task_of(whisper, **params).check()
    assert len(faults) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(faults[0])


@pytest.mark.parametrize("language", ["de", "German", "<|de|>"])
def test_a_language_goes_by_its_code_its_name_or_its_token(whisper: str, language: str) -> None:
    assert task_of(whisper, language=language).check() == []


def test_an_english_whisper_takes_no_language(tmp_path: Path) -> None:
    folder = tiny_whisper(tmp_path, english_only=True)
    assert task_of(folder).check() == []
    assert "models of several languages" in task_of(folder, language="en").check()[0]


def test_seconds_need_what_the_model_files_say_of_them(tmp_path: Path) -> None:
    folder = tiny_whisper(tmp_path)
    path = tmp_path / "generation_config.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in known.items() if key != "alignment_heads"}))
    assert "alignment_heads" in task_of(folder, return_timestamps="word").check()[0]
    assert task_of(folder, return_timestamps=True).check() == []


def test_a_ctc_model_has_no_use_for_params_of_generation(tmp_path: Path) -> None:
    folder = tiny_wav2vec2(tmp_path, "Wav2Vec2ForCTC")
    faults = task_of(folder, language="en", num_beams=2).check()
    assert len(faults) == 1
    assert faults[0].startswith("params.language, params.num_beams: ")
    assert "return_timestamps='word'" in task_of(folder, return_timestamps=True).check()[0]


def test_the_report_draws_characters(whisper: str) -> None:
    columns = {"audio": [file_of(recording) for recording in WINDOW[:3]]}
    task = task_of(whisper, **GREEDY)
    texts = run(task, columns)["text"].to_pylist()
    assert measured(task, columns).tolist() == [len(text) for text in texts]


def test_the_example_runs(tmp_path: Path) -> None:
    example = SpeechRecognition.EXAMPLE
    task = task_of(
        tiny_wav2vec2(tmp_path / "model", "Wav2Vec2ForCTC"), files=RowFiles(str(tmp_path)), **example.params
    )
    for name in example.rows["audio"]:
        (tmp_path / name).write_bytes(file_of(SHORT[3]))
    row = run(task, example.rows).to_pylist()[0]
    assert row["text"] == " ".join(piece["text"] for piece in row["chunks"])
