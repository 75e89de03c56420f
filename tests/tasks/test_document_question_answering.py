"""Answers from pages are those of the pipeline for one row, over windows of long pages and whatever the batch."""

from __future__ import annotations

import importlib.util
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers import pipeline

from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from tests.models.multimodal import tiny_blip, tiny_donut, tiny_layoutlm
from tests.models.text import CORPUS
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_pipeline_tasks import assert_alike, image_files

KIND: type[Task] = task_class("document-question-answering")
RANDOM = np.random.default_rng(0)
ASKED = ["who reads the river?", "is it a table?", "what does not forget, word for word?"]
QUESTIONS = [ASKED[k % 3] for k in range(12)]
WORDS = [" ".join(CORPUS[k : k + 1 + (k * 5) % 13]).split() for k in range(12)]
BOXES = [np.sort(RANDOM.integers(0, 1001, (len(words), 4))).tolist() for words in WORDS]
PAGES = {"question": QUESTIONS, "words": WORDS, "boxes": BOXES}


def answers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the pipeline returns, with the keys of the task's struct."""
    return [{name: one.get(name) for name in ("score", "answer", "start", "end")} for one in found]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "top_k": 3,
            "doc_stride": 8,
            "max_seq_len": 40,
            "max_answer_len": 4,
            "handle_impossible_answer": True,
        },
    ],
    ids=["defaults", "options"],
)
def test_answers_among_words_with_boxes(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_layoutlm(tmp_path)
    task = make(KIND, folder, **options)
    assert task.check() == []
    oracle = pipeline("document-question-answering", folder, device="cpu", **options)
    expected = []
    for question, words, boxes in zip(QUESTIONS, WORDS, BOXES, strict=True):
        pairs = list(zip(words, boxes, strict=True))
        expected.append((answers(oracle(image=None, question=question, word_boxes=pairs)),))
    assert len({row[0][0]["answer"] for row in expected}) > 5
    assert_alike(run(task, PAGES), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_that_a_donut_writes(tmp_path: Path, beams: int) -> None:
    folder, files = tiny_donut(tmp_path), image_files(12)
    options = {"max_new_tokens": 12, "num_beams": beams}
    task = make(KIND, folder, **options)
    assert task.check() == []
    oracle = pipeline("document-question-answering", folder, device="cpu", **options)
    expected = [
        (answers(oracle(image=Image.open(BytesIO(file)), question=question)),)
        for file, question in zip(files, QUESTIONS, strict=True)
    ]
    assert len({row[0][0]["answer"] for row in expected}) > 5
    assert_alike(run(task, {"image": files, "question": QUESTIONS}), expected)


def test_a_page_has_to_be_there_as_the_model_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder, writer = make(KIND, tiny_layoutlm(tmp_path / "a")), make(KIND, tiny_donut(tmp_path / "b"))
    assert finder.column_faults({"question", "words", "boxes"}) == []
    assert "needed together" in finder.column_faults({"question", "words"})[0]
    assert "--column image" in writer.column_faults({"question", "words", "boxes"})[0]
    assert writer.column_faults({"question", "image"}) == []
    monkeypatch.setattr("hfbatch.tasks.multimodal.document_question_answering.find_spec", lambda name: None)
    assert "hfbatch[ocr]" in finder.column_faults({"question", "image"})[0]


@pytest.mark.skipif(
    importlib.util.find_spec("pytesseract") is None or shutil.which("tesseract") is None,
    reason="needs the extra ocr and the program tesseract",
)
def test_words_come_from_ocr_where_there_are_none(tmp_path: Path) -> None:
    folder = tiny_layoutlm(tmp_path)
    page = Image.new("RGB", (400, 60), "white")
    ImageDraw.Draw(page).text((10, 10), "The engineer reads", fill="black", font_size=32)
    target = BytesIO()
    page.save(target, "PNG")
    found = run(make(KIND, folder), {"image": [target.getvalue()], "question": ["who reads?"]})
    oracle = pipeline("document-question-answering", folder, device="cpu")
    assert found["answers"][0].as_py()[0]["answer"] == oracle(image=page, question="who reads?")[0]["answer"]


def test_bad_pages_are_errors(tmp_path: Path) -> None:
    task = make(KIND, tiny_layoutlm(tmp_path))
    for words, boxes in ((["a", "b"], [[0, 0, 1, 1]]), (["a"], [[0, 0, 1, 1001]]), (["a"], [[0, 0, 1]])):
        with pytest.raises(ValueError, match="box"):
            features_of(task, {"question": ["who?"], "words": [words], "boxes": [boxes]})
    with pytest.raises(ValueError, match="the question leaves"):
        features_of(task, {"question": ["who " * 40], "words": [["a"]], "boxes": [[[0, 0, 1, 1]]]})


def test_models_and_params_of_other_tasks_are_refused(tmp_path: Path) -> None:
    (fault,) = make(KIND, tiny_blip(tmp_path / "a", "QuestionAnswering")).check()
    assert "BlipForQuestionAnswering" in fault
    (fault,) = make(KIND, tiny_donut(tmp_path / "b"), doc_stride=8).check()
    assert "doc_stride" in fault
    faults = make(KIND, tiny_layoutlm(tmp_path / "c"), num_beams=2, max_seq_len=65).check()
    assert "num_beams" in faults[0]
    assert "max_seq_len 65" in faults[1]


def test_the_example_runs(tmp_path: Path) -> None:
    task = make(KIND, tiny_layoutlm(tmp_path), **KIND.EXAMPLE.params)
    (row,) = run(task, KIND.EXAMPLE.rows)["answers"].to_pylist()
    assert row[0]["answer"] in "Written by Ada"
    np.testing.assert_allclose(measured(task, KIND.EXAMPLE.rows), [row[0]["score"]], atol=1e-6)
