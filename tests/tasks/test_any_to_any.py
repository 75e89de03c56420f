"""Texts about audio and images are those of the pipeline for one row, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5OmniConfig, pipeline

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from tests.models.multimodal import tiny_llava, tiny_qwen2_audio
from tests.models.text import tiny_bert
from tests.tasks.drive import features_of, make, run
from tests.tasks.test_audio_tasks import RECORDINGS, file_of, tone
from tests.tasks.test_multimodal_generation import FILES, SHORT, TEXTS, shown, typed

KIND: type[Task] = task_class("any-to-any")
DECODED = [*RECORDINGS[:11], tone(2.5, 300)]
"""The last one is longer than the model hears."""


@pytest.fixture(scope="module")
def audio_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_qwen2_audio(tmp_path_factory.mktemp("qwen2_audio"))


def texts_of(task: Task, columns: dict[str, Any], size: int | None = None) -> list[str]:
    return run(task, columns, size)["generated_text"].to_pylist()


def spoken(k: int, recording: Any) -> list[dict[str, Any]]:
    """A chat of typed parts; every fourth one has two recordings."""
    decoded = {"type": "audio", "audio": recording}
    parts = [decoded, {"type": "text", "text": TEXTS[k]}, *([decoded] if k % 4 == 0 else [])]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
    ]


def test_chats_with_audio_in_them(audio_model: str) -> None:
    task = make(KIND, audio_model, **SHORT)
    assert task.check() == []
    assert task.column_faults({"messages", "audio"}) == []
    oracle = pipeline("any-to-any", audio_model, device="cpu", **SHORT)
    expected = [
        oracle(text=spoken(k, recording), return_full_text=False)[0]["generated_text"]
        for k, recording in enumerate(DECODED)
    ]
    assert len(set(expected)) > 6
    files = [file_of(recording) for recording in DECODED]
    columns = {"messages": [spoken(k, file) for k, file in enumerate(files)]}
    assert texts_of(task, columns) == expected
    assert features_of(task, columns).truncated == 1
    beside = [[file] * (1 + (k % 4 == 0)) for k, file in enumerate(files)]
    bare = [spoken(k, None) for k in range(len(files))]
    assert texts_of(task, {"messages": bare, "audio": beside}) == expected


def test_prompts_about_audio(audio_model: str) -> None:
    task = make(KIND, audio_model, **SHORT)
    texts = [f"<audio>{text}" for text in TEXTS]
    oracle = pipeline("any-to-any", audio_model, device="cpu", **SHORT)
    expected = [
        oracle(text=text, audio=recording, images=None, return_full_text=False)[0]["generated_text"]
        for text, recording in zip(texts, DECODED, strict=True)
    ]
    columns = {"audio": [file_of(recording) for recording in DECODED], "text": texts}
    assert texts_of(task, columns) == expected
    assert features_of(task, columns).truncated == 1


def test_chats_with_images_in_them(tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path)
    task = make(KIND, folder, **SHORT)
    assert task.check() == []
    oracle = pipeline("image-text-to-text", folder, device="cpu", **SHORT)  # any-to-any asks for torchvision
    expected = [
        oracle(text=typed(k, shown(file)), return_full_text=False)[0]["generated_text"]
        for k, file in enumerate(FILES)
    ]
    chats = [typed(k, file) for k, file in enumerate(FILES)]
    assert texts_of(task, {"messages": chats}) == expected


def test_what_the_model_does_not_take_is_refused(tmp_path: Path, audio_model: str) -> None:
    task = make(KIND, audio_model)
    assert "not image" in task.column_faults({"messages", "image"})[0]
    with pytest.raises(ValueError, match="'image'"):
        features_of(task, {"messages": [typed(0, FILES[0])]})
    bert = make(KIND, tiny_bert(tmp_path / "bert"))
    assert "BertForSequenceClassification" in bert.check()[0]
    assert "no chat template" in bert.column_faults({"messages"})[0]
    omni = Qwen2_5OmniConfig(architectures=["Qwen2_5OmniForConditionalGeneration"])
    omni.save_pretrained(tmp_path / "omni")
    assert "outputs audio too" in make(KIND, str(tmp_path / "omni")).check()[0]


def test_the_example_runs(tmp_path: Path, audio_model: str) -> None:
    task = make(KIND, audio_model, files=RowFiles(str(tmp_path)), **KIND.EXAMPLE.params)
    (tmp_path / KIND.EXAMPLE.rows["audio"][0]).write_bytes(file_of(RECORDINGS[0]))
    assert texts_of(task, KIND.EXAMPLE.rows)[0]
