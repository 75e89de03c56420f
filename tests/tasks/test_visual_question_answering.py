"""Answers about images: the documented use of the model classes, row by row, is the oracle."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForQuestionAnswering, ViltForQuestionAnswering

from hfbatch.data.media_files import RowFiles
from hfbatch.tasks import task_class
from tests.models.multimodal import tiny_blip, tiny_vilt
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_pipeline_tasks import assert_alike, image_files

ANSWERS = {k: f"answer {k}" for k in range(7)}
FILES = image_files(12, seed=1)
ASKED = ["who reads the river?", "is it a table?", "what does not forget at 10:45 on Monday, word for word?"]
QUESTIONS = [*(ASKED[k % 3] for k in range(11)), "why " * 90]


def oracle_inputs(processor: Any, file: bytes, question: str, limit: int) -> Any:
    image = Image.open(BytesIO(file)).convert("RGB")
    return processor(images=image, text=question, truncation=True, max_length=limit, return_tensors="pt")


def test_a_classifier_gives_the_sigmoid_of_each_answer(tmp_path: Path) -> None:
    folder = tiny_vilt(tmp_path, ANSWERS)
    task = make(task_class("vqa"), folder, top_k=3)
    assert task.check() == []
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for file, question in zip(FILES, QUESTIONS, strict=True):
        inputs = oracle_inputs(processor, file, question, 40)
        with torch.inference_mode():
            scores = model(**inputs).logits[0].sigmoid()
        best = scores.argsort(descending=True)[:3].tolist()
        expected.append(([{"answer": ANSWERS[place], "score": float(scores[place])} for place in best],))
    assert len({row[0][0]["answer"] for row in expected}) > 3
    columns = {"image": FILES, "question": QUESTIONS}
    assert_alike(run(task, columns), expected)
    assert features_of(task, columns).truncated == 1
    np.testing.assert_allclose(measured(task, columns), [row[0][0]["score"] for row in expected], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "max_new_tokens": 6}])
def test_a_model_that_writes_gives_its_answer(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_blip(tmp_path, "QuestionAnswering")
    task = make(task_class("visual-question-answering"), folder, **options)
    assert task.check() == []
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    expected = []
    for file, question in zip(FILES, QUESTIONS, strict=True):
        inputs = oracle_inputs(processor, file, question, 64)
        answer = processor.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
        expected.append(([{"answer": answer.strip(), "score": None}],))
    assert len({row[0][0]["answer"] for row in expected}) > 3
    assert len({len(row[0][0]["answer"].split()) for row in expected}) > 1
    assert_alike(run(task, {"image": FILES, "question": QUESTIONS}), expected)


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
    task = make(
        kind, tiny_vilt(tmp_path / "model", ANSWERS), files=RowFiles(str(tmp_path)), **kind.EXAMPLE.params
    )
    (tmp_path / kind.EXAMPLE.rows["image"][0]).write_bytes(FILES[0])
    assert len(run(task, kind.EXAMPLE.rows).to_pylist()[0]["answers"]) == 2
