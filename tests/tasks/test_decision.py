"""Answers to typed questions are those of the transformers pipeline, row for row, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import JevConfig, JevForDecision, LlamaConfig, pipeline
from transformers.decision import DecisionConfig
from transformers.models.jev.configuration_jev import JEV_TEMPLATE

from hfbatch.tasks import task_class
from tests.models.text import CHAT_TEMPLATE, CORPUS, bytes_tokenizer, tiny_llama
from tests.tasks.drive import features_of, make, measured, run

QUESTIONS: dict[str, Any] = {
    "about": {"type": "choice", "instructions": "What is it about?",
              "criteria": {"water": None, "work": "Jobs and engineers", "words": None}},
    "late": {"type": "noul", "instructions": "Is it late?", "criteria": {"true": "At night", "false": None}},
    "urgency": {"type": "score", "criteria": ["Can wait", {"when": "this week"}, "Today"]},
}  # fmt: skip
STATES = [*CORPUS[:9], "", "river " * 9, "Two\nlines, and a <s>."]
SETTINGS = {"labels": {"noul": ["Y", "N"]}, "temperature": {"choice": 2.0, "score": 0.5}}


def chat_model(folder: Path) -> str:
    """A Llama that answers by the letters of the options."""
    DecisionConfig(**SETTINGS).save_pretrained(folder)
    return tiny_llama(folder, CHAT_TEMPLATE, max_position_embeddings=640, initializer_range=0.4)


def decision_model(folder: Path) -> str:
    """A model with a head for decisions, read at marks in a prompt of its own."""
    tokenizer = bytes_tokenizer(640, CHAT_TEMPLATE)
    text = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=640, vocab_size=len(tokenizer), initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = JevForDecision(JevConfig(hidden_size=32, text_config=text.to_dict(), initializer_range=0.3))
    model.decision_config = DecisionConfig(chat_template=JEV_TEMPLATE, noul_options=["false", "true"])
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Answers as the pipeline has them, but for the legend."""
    found = {}
    for answer in answers:
        kept = {key: value for key, value in answer.items() if value is not None}
        if "probabilities" in kept:
            kept["probabilities"] = {one["option"]: one["probability"] for one in kept["probabilities"]}
        found[kept.pop("question")] = kept
    return found


def assert_alike(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for name, answer in want.items():
        answer.pop("legend", None)
        for key in ("type", "choice"):
            assert got[name].get(key) == answer.get(key)
        numbers = [key for key, value in answer.items() if isinstance(value, float)]
        np.testing.assert_allclose(
            [got[name][key] for key in numbers], [answer[key] for key in numbers], atol=1e-4
        )
        assert got[name].get("probabilities", {}) == pytest.approx(answer.get("probabilities", {}), abs=1e-4)


@pytest.mark.parametrize("build", [chat_model, decision_model])
def test_answers_are_those_of_the_pipeline(tmp_path: Path, build: Any) -> None:
    folder = build(tmp_path)
    task = make(task_class("decision"), folder, questions=QUESTIONS)
    assert task.check() == []
    assert task.column_faults({"state"}) == []
    oracle = pipeline("decision", folder, device="cpu")
    expected = [oracle({"state": state, "questions": QUESTIONS}) for state in STATES]
    found = [plain(row) for row in run(task, {"state": STATES})["answers"].to_pylist()]
    for got, want in zip(found, expected, strict=True):
        assert_alike(got, want)
    assert np.std([row["about"]["confidence"] for row in found]) > 0.01
    assert np.std([row["late"]["noul"] for row in found]) > 0.01
    assert np.std([row["urgency"]["score"] for row in found]) > 0.01


def test_every_row_may_bring_its_own_questions(tmp_path: Path) -> None:
    folder = chat_model(tmp_path)
    names = list(QUESTIONS)
    requests = [
        {"state": {"text": state}, "questions": {name: QUESTIONS[name] for name in names[: 1 + k % 3]}}
        for k, state in enumerate(STATES)
    ]
    task = make(task_class("decision"), folder)
    assert task.check() == []
    table = run(task, {"request": [json.dumps(request) for request in requests]}, 8)
    oracle = pipeline("decision", folder, device="cpu")
    for got, request in zip(table["answers"].to_pylist(), requests, strict=True):
        assert_alike(plain(got), oracle(request))


def test_faults_are_reported_before_work(tmp_path: Path) -> None:
    folder = chat_model(tmp_path)
    kind = task_class("decision")
    (fault,) = make(kind, folder, questions={"mood": {"type": "choice"}}).check()
    assert "params.questions" in fault
    assert "mood" in fault
    assert "needs a column 'state' or 'request'" in make(kind, folder).column_faults(set())[0]
    assert "no questions for" in make(kind, folder).column_faults({"state"})[0]
    assert "has its own" in make(kind, folder, questions=QUESTIONS).column_faults({"request"})[0]
    plain_model = tiny_llama(tmp_path / "plain")
    assert "no chat template" in make(kind, plain_model).check()[0]
    DecisionConfig(**SETTINGS, adapter="adapter").save_pretrained(folder)
    assert "in the adapter" in make(kind, folder).check()[0]


def test_a_row_that_cannot_be_asked_is_an_error(tmp_path: Path) -> None:
    task = make(task_class("decision"), chat_model(tmp_path))
    with pytest.raises(ValueError, match="A request is"):
        features_of(task, {"request": ['{"state": "no questions"}']})
    with pytest.raises(ValueError, match="Expecting value"):
        features_of(task, {"request": ["no JSON"]})
    with pytest.raises(ValueError, match="tokens; the model takes 640"):
        features_of(task, {"request": [json.dumps({"state": "long " * 640, "questions": QUESTIONS})]})


def test_the_example_runs_and_the_report_draws_confidence(tmp_path: Path) -> None:
    kind = task_class("decision")
    task = make(kind, chat_model(tmp_path), **kind.EXAMPLE.params)
    first = [row[0]["confidence"] for row in run(task, kind.EXAMPLE.rows)["answers"].to_pylist()]
    np.testing.assert_allclose(measured(task, kind.EXAMPLE.rows), first, atol=1e-6)
    task = make(kind, chat_model(tmp_path), questions={"late": QUESTIONS["late"]})
    (row,) = run(task, {"state": STATES[:1]})["answers"].to_pylist()
    assert measured(task, {"state": STATES[:1]}) == pytest.approx([abs(2 * row[0]["noul"] - 1)])
