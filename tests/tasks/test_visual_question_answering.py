"""Answers about pictures: the documented use of the model classes, row by row, is the oracle."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForQuestionAnswering, ViltForQuestionAnswering

from hfbatch.tasks import task_class
from tests.models.multimodal import tiny_blip, tiny_vilt
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_pipeline_tasks import pictures

ANSWERS = {k: f"answer {k}" for k in range(7)}
FILES = pictures(22)
ASKED = ["who reads the river?", "is it a table?", "what does not forget at 10:45 on Monday, word for word?"]
QUESTIONS = [*(ASKED[k % 3] for k in range(21)), "why " * 90]


def oracle_inputs(folder: str, file: bytes, question: str, limit: int) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.open(BytesIO(file)).convert("RGB")
    return processor, processor(
        images=image, text=question, truncation=True, max_length=limit, return_tensors="pt"
    )


@pytest.mark.parametrize("size", [1, 8])
def test_a_classifier_gives_the_sigmoid_of_each_answer(tmp_path: Path, size: int) -> None:
    folder = tiny_vilt(tmp_path, ANSWERS)
    task = make(task_class("vqa"), folder, top_k=3)
    assert task.check() == []
    found = run(task, {"image": FILES, "question": QUESTIONS}, size)["answers"].to_pylist()
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    for got, file, question in zip(found, FILES, QUESTIONS, strict=True):
        _, inputs = oracle_inputs(folder, file, question, 40)
        with torch.inference_mode():
            scores = model(**inputs).logits[0].sigmoid()
        best = scores.argsort(descending=True)[:3].tolist()
        assert [one["answer"] for one in got] == [ANSWERS[place] for place in best]
        np.testing.assert_allclose([one["score"] for one in got], scores[best], atol=1e-4)
    assert len({row[0]["answer"] for row in found}) > 3
    assert features_of(task, {"image": FILES, "question": QUESTIONS}).truncated == 1
    np.testing.assert_allclose(
        measured(task, {"image": FILES[:3], "question": QUESTIONS[:3]}),
        [row[0]["score"] for row in found[:3]],
        atol=1e-4,
    )


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "max_new_tokens": 6}])
def test_a_model_that_writes_gives_its_answer(tmp_path: Path, options: dict[str, Any], size: int) -> None:
    folder = tiny_blip(tmp_path, "QuestionAnswering")
    task = make(task_class("visual-question-answering"), folder, **options)
    assert task.check() == []
    found = run(task, {"image": FILES, "question": QUESTIONS}, size)["answers"].to_pylist()
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    for got, file, question in zip(found, FILES, QUESTIONS, strict=True):
        processor, inputs = oracle_inputs(folder, file, question, 64)
        expected = processor.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
        assert got == [{"answer": expected.strip(), "score": None}]
    assert len({row[0]["answer"] for row in found}) > 5
    assert len({len(row[0]["answer"].split()) for row in found}) > 1


def test_models_and_params_of_other_tasks_are_refused(tmp_path: Path) -> None:
    kind = task_class("vqa")
    (fault,) = make(kind, tiny_blip(tmp_path / "a", "ConditionalGeneration")).check()
    assert "BlipForConditionalGeneration" in fault
    assert "image-text-to-text" in fault
    folder = tiny_vilt(tmp_path / "b", ANSWERS, max_image_length=4)
    several = make(kind, folder, 41, num_beams=2).check()
    assert [text for text in several if "num_beams" in text]
    assert [text for text in several if "4 patches" in text]
    assert [text for text in several if "max_length 41" in text]


def test_the_example_runs(tmp_path: Path) -> None:
    kind = task_class("vqa")
    task = make(kind, tiny_vilt(tmp_path / "model", ANSWERS), **kind.EXAMPLE.params)
    (tmp_path / kind.EXAMPLE.rows["image"][0]).write_bytes(FILES[0])
    task.root = str(tmp_path)
    assert len(run(task, kind.EXAMPLE.rows).to_pylist()[0]["answers"]) == 2
