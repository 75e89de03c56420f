"""Encoder-decoder tasks write what the model's own `generate` writes for each text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hfbatch.tasks import task_class
from tests.models.text import CORPUS, tiny_t5
from tests.tasks.drive import features_of, make, measured, run

TEXTS = [*CORPUS[:8], "river " * 200, "10:45", "", CORPUS[50]]


def oracle(folder: str, texts: list[str], **options: Any) -> list[str]:
    """The documented use of the model class: tokenise, generate, decode; one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts_out = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, return_token_type_ids=False)
        with torch.inference_mode():
            ids = model.generate(**inputs, **{"do_sample": False, **options})
        texts_out.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts_out


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        {"max_new_tokens": 12, "min_new_tokens": 6, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    ],
)
def test_greedy_and_beam_search(t5: str, options: dict[str, Any]) -> None:
    task = make(task_class("text2text-generation"), t5, **options)
    assert task.check() == []
    found = run(task, {"text": TEXTS})["generated_text"].to_pylist()
    expected = oracle(t5, TEXTS, **options)
    assert len(set(expected)) > 5
    assert found == expected
    assert features_of(task, {"text": TEXTS}).truncated == 1


def test_a_summary_takes_prefix_and_lengths_from_the_models_config(tmp_path: Path) -> None:
    params = {"summarization": {"prefix": "summarize: ", "max_length": 9, "num_beams": 2}}
    folder = tiny_t5(tmp_path, task_specific_params=params)
    task = make(task_class("summarization"), folder)
    found = run(task, {"text": TEXTS[:8]})["summary_text"].to_pylist()
    assert found == oracle(folder, [f"summarize: {text}" for text in TEXTS[:8]], max_length=9, num_beams=2)
    task = make(task_class("summarization"), folder, prefix="", max_new_tokens=5)
    found = run(task, {"text": TEXTS[:8]})["summary_text"].to_pylist()
    assert found == oracle(folder, TEXTS[:8], max_new_tokens=5, num_beams=2)


def test_a_translation_takes_the_prefix_of_its_languages(tmp_path: Path) -> None:
    params = {"translation_en_to_de": {"prefix": "translate English to German: ", "max_length": 12}}
    folder = tiny_t5(tmp_path, task_specific_params=params)
    task = make(task_class("translation"), folder, src_lang="en", tgt_lang="de")
    found = run(task, {"text": TEXTS[:8]})["translation_text"].to_pylist()
    texts = [f"translate English to German: {text}" for text in TEXTS[:8]]
    assert found == oracle(folder, texts, max_length=12)


def test_the_report_counts_new_tokens(t5: str) -> None:
    task = make(task_class("text2text-generation"), t5, max_new_tokens=7)
    assert measured(task, {"text": TEXTS[:4]}).max() <= 7
