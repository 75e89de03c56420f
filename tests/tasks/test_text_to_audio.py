"""Text to audio gives the pipeline's audio of each text, and what is random depends on the row alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
import transformers
from transformers import pipeline

from hfbatch.data.media import to_wav
from hfbatch.tasks import task_class
from hfbatch.tasks.audio.text_to_audio import TextToAudio
from hfbatch.tasks.generation.sampling import row_seeds
from tests.models.audio import tiny_musicgen, tiny_speecht5, tiny_vits
from tests.tasks.drive import features_of, load, make, measured, run

TEXTS = [f"{word} number {chr(97 + k)}." for k in range(4) for word in ("train", "a quiet river", "gap")]
VOICES = np.random.default_rng(0).normal(size=(len(TEXTS), 8)).astype(np.float32)


def task_of(folder: str, **params: Any) -> TextToAudio:
    return make(task_class("text-to-audio"), folder, **params)


def assert_equal_to_pipeline(
    task: TextToAudio, columns: Mapping[str, Any], speak: Callable[[int], Mapping[str, Any]]
) -> None:
    """The audio of each row is that of a call for it alone, seeded as the row is, in batches of 1 and of 8."""
    assert task.check() == []
    seeds = row_seeds(0, pa.table({"file": ["rows.parquet"] * len(TEXTS), "row": range(len(TEXTS))}))
    expected = []
    for k, seed in enumerate(seeds.tolist()):
        torch.manual_seed(seed)
        expected.append(speak(k))
    assert (
        len({len(one["audio"]) for one in expected}) > 1 or len({one["audio"].sum() for one in expected}) > 5
    )
    found = run(task, columns).to_pylist()
    for got, want in zip(found, expected, strict=True):
        samples, rate = soundfile.read(BytesIO(got["audio"]), dtype="float32")
        assert rate == got["sampling_rate"] == want["sampling_rate"]
        np.testing.assert_allclose(samples, want["audio"].T.clip(-1, 1), atol=1e-4)


@pytest.mark.parametrize("speakers", [1, 3])
def test_vits_speaks_as_the_pipeline_does(tmp_path: Path, speakers: int) -> None:
    folder = tiny_vits(tmp_path, speakers)
    options = {"speaker_id": 2} if speakers > 1 else {}
    oracle = pipeline("text-to-audio", folder, device="cpu")
    assert_equal_to_pipeline(
        task_of(folder, **options), {"text": TEXTS}, lambda k: oracle(TEXTS[k], forward_params=options)
    )


def test_speecht5_speaks_as_the_pipeline_does_with_the_voice_of_each_row(tmp_path: Path) -> None:
    folder, vocoder = tiny_speecht5(tmp_path)
    oracle = pipeline(
        "text-to-audio", folder, device="cpu", vocoder=transformers.SpeechT5HifiGan.from_pretrained(vocoder)
    )
    columns = {"text": TEXTS, "speaker_embeddings": VOICES.tolist()}
    assert_equal_to_pipeline(
        task_of(folder, vocoder=vocoder),
        columns,
        lambda k: oracle(
            TEXTS[k], forward_params={"speaker_embeddings": torch.from_numpy(VOICES[k : k + 1])}
        ),
    )


def test_musicgen_plays_as_the_pipeline_does(tmp_path: Path) -> None:
    folder = tiny_musicgen(tmp_path)
    generate = {"max_new_tokens": 12, "temperature": 1.5}
    oracle = pipeline("text-to-audio", folder, device="cpu")
    assert_equal_to_pipeline(
        task_of(folder, **generate), {"text": TEXTS}, lambda k: oracle(TEXTS[k], generate_kwargs=generate)
    )


def test_another_seed_gives_other_audio(tmp_path: Path) -> None:
    folder = tiny_vits(tmp_path)
    first = run(task_of(folder), {"text": TEXTS[:2]})
    assert first.equals(run(task_of(folder), {"text": TEXTS[:2]}))
    assert not first.equals(run(task_of(folder, seed=1), {"text": TEXTS[:2]}))


def test_the_rest_of_the_process_keeps_its_random_numbers(tmp_path: Path) -> None:
    task = task_of(tiny_vits(tmp_path))
    batch = task.collate(features_of(task, {"text": TEXTS[:2]}).table, np.arange(2), 1)
    model = load(task)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    task.forward(model, batch)
    assert torch.equal(torch.rand(3), expected)


def test_params_that_a_model_has_no_use_for_are_faults(tmp_path: Path) -> None:
    folder = tiny_vits(tmp_path / "vits")
    (fault,) = task_of(folder, speaker_id=1, max_new_tokens=3, vocoder="x").check()
    assert fault.startswith("params.max_new_tokens, params.vocoder, params.speaker_id: ")
    several = tiny_vits(tmp_path / "several", speakers=3)
    assert "set at most 2" in task_of(several, speaker_id=3).check()[0]


def test_speecht5_needs_a_vocoder_and_a_voice(tmp_path: Path) -> None:
    folder, vocoder = tiny_speecht5(tmp_path)
    assert "needs params.vocoder" in task_of(folder).check()[0]
    task = task_of(folder, vocoder=vocoder)
    assert "speaker_embeddings" in task.column_faults({"text"})[0]
    assert task.column_faults({"text", "speaker_embeddings"}) == []
    assert task_of(tiny_vits(tmp_path / "vits")).column_faults({"text"}) == []


def test_wav_files_have_16_bits_and_all_channels() -> None:
    stereo = np.stack([np.linspace(-1, 1, 50), np.zeros(50)])
    samples, rate = soundfile.read(BytesIO(to_wav(stereo, 8000)))
    assert rate == 8000
    np.testing.assert_allclose(samples, stereo.T, atol=1e-4)
    assert soundfile.info(BytesIO(to_wav(stereo, 8000))).subtype == "PCM_16"


def test_the_example_runs_and_the_report_draws_seconds(tmp_path: Path) -> None:
    task = task_of(tiny_vits(tmp_path))
    columns = dict(TextToAudio.EXAMPLE.rows)
    rows = run(task, columns).to_pylist()
    seconds = [(len(row["audio"]) - 44) / 2 / row["sampling_rate"] for row in rows]
    np.testing.assert_allclose(measured(task, columns), seconds, atol=1e-6)
    assert min(seconds) > 0
