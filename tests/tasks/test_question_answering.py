"""Question answering and reranking: the documented use of the model classes, pair by pair, is the oracle."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from hfbatch.tasks import task_class
from tests.models.text import CORPUS, tiny_bert, tiny_bert_for
from tests.tasks.drive import make, measured, run

QUESTIONS = [f"who {word}?" for word in ("reads", "forgets", "crosses", "writes a table")] * 3
CONTEXTS = [" ".join(CORPUS[k : k + 1 + k % 7]) for k in range(12)]


def best_spans(
    tokenizer: Any, model: Any, question: str, context: str, top_k: int, longest: int, none: bool
) -> list[Any]:
    """Every span of every window, scored one by one; a span that two windows have counts with its better score."""
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=40, stride=8, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    spans: dict[tuple[int, int], float] = {}
    empty = 1.0
    for k in range(len(encoded["input_ids"])):
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.inference_mode():
            output = model(**{name: torch.tensor([encoded[name][k]]) for name in names})
        inside = [part == 1 for part in encoded.sequence_ids(k)]
        usable = torch.tensor([True, *inside[1:]])
        start, end = (
            logits[0].double().masked_fill(~usable, -torch.inf).softmax(0).tolist()
            for logits in (output.start_logits, output.end_logits)
        )
        empty = min(empty, start[0] * end[0])
        offsets = encoded["offset_mapping"][k]
        tokens = [place for place, part in enumerate(inside) if part]
        for i, j in product(tokens, tokens):
            if i <= j < i + longest:
                place = offsets[i][0], offsets[j][1]
                spans[place] = max(spans.get(place, 0.0), start[i] * end[j])
    found = [(score, first, last) for (first, last), score in spans.items()] + [(empty, 0, 0)] * none
    return sorted(found, key=lambda one: -one[0])[:top_k]


@pytest.mark.parametrize("none", [False, True])
def test_spans_over_the_windows_of_long_contexts(tmp_path: Path, none: bool) -> None:
    folder = tiny_bert_for(tmp_path, "QuestionAnswering")
    params = {
        "top_k": 3, "doc_stride": 8, "max_seq_len": 40, "max_answer_len": 6, "handle_impossible_answer": none
    }  # fmt: skip
    task = make(task_class("question-answering"), folder, **params)
    assert task.check() == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    found = run(task, {"question": QUESTIONS, "context": CONTEXTS})["answers"].to_pylist()
    for got, question, context in zip(found, QUESTIONS, CONTEXTS, strict=True):
        expected = best_spans(tokenizer, model, question, context, 3, 6, none)
        assert [(one["start"], one["end"]) for one in got] == [one[1:] for one in expected]
        np.testing.assert_allclose([one["score"] for one in got], [one[0] for one in expected], atol=1e-4)
        assert all(one["answer"] == context[one["start"] : one["end"]] for one in got)


def test_a_question_that_fills_the_window_is_an_error(tmp_path: Path) -> None:
    task = make(
        task_class("question-answering"), tiny_bert_for(tmp_path, "QuestionAnswering"), max_seq_len=16
    )
    with pytest.raises(ValueError, match="leaves no room"):
        run(task, {"question": ["river " * 40], "context": ["dawn"]})


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_documents_are_scored_as_by_a_cross_encoder(tmp_path: Path, activation: str) -> None:
    folder = tiny_bert(tmp_path, num_labels=1)
    queries = [*CORPUS[:10], "dawn " * 90, ""]
    documents = [[CORPUS[(7 * k + step) % 72] for step in range(k % 4)] for k in range(12)]
    task = make(task_class("text-ranking"), folder, activation=activation)
    table = run(task, {"query": queries, "documents": documents})
    function = torch.nn.Sigmoid() if activation == "sigmoid" else torch.nn.Identity()
    oracle = CrossEncoder(folder, device="cpu", max_length=64)
    for got, query, texts in zip(table["scores"].to_pylist(), queries, documents, strict=True):
        expected = [
            oracle.predict([(query, text)], activation_fn=function, show_progress_bar=False)[0]
            for text in texts
        ]
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert measured(task, {"query": queries[:3], "documents": documents[:3]}).tolist()[0] == 0.0
