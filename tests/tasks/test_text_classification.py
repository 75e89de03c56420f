"""Labels and scores equal those of transformers' text-classification pipeline, whatever the batch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    TextClassificationPipeline,
    pipeline,
)

from hfbatch.tasks.text.text_classification import TextClassification
from hfbatch.tasks.text.text_ranking import TextRanking
from tests.models.text import CORPUS, bytes_tokenizer, save, tiny_bert, tiny_llama_classifier
from tests.tasks.drive import features_of, make, measured, run

TEXTS = [*CORPUS[:6], "", "river " * 200, "Numbers, numbers: 10:45!"]
PAIRS = [*CORPUS[20:26], "second", "", "dawn " * 100]
NAMES = {0: "calm", 1: "angry", 2: "undecided"}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three labels, of which one is right."""
    return tiny_bert(tmp_path_factory.mktemp("single"), id2label=NAMES)


@cache
def classifier(folder: str) -> Any:
    """The pipeline on a model whose files stay as they are."""
    return pipeline("text-classification", folder, device="cpu", truncation=True)


def oracle(folder: str, rows: list[Any], **options: Any) -> list[list[dict[str, Any]]]:
    """What the pipeline gives for each row alone: a list of labels and scores, best first."""
    classify = classifier(folder)
    assert isinstance(classify, TextClassificationPipeline)
    results = [classify(row, **{"top_k": 1, **options}) for row in rows]
    return [result if isinstance(result, list) else [result] for result in results]


def assert_like_the_pipeline(folder: str, pairs: list[str] | None = None, **params: Any) -> None:
    task = make(TextClassification, folder, **params)
    assert task.check() == []
    columns = {"text": TEXTS} | ({"text_pair": pairs} if pairs else {})
    table = run(task, columns, multiple=8)
    rows = (
        TEXTS if pairs is None else [{"text": a, "text_pair": b} for a, b in zip(TEXTS, pairs, strict=True)]
    )
    for got, expected in zip(table.to_pylist(), oracle(folder, rows, **params), strict=True):
        flat = params.get("top_k", 1) == 1
        labels, scores = ([got["label"]], [got["score"]]) if flat else (got["label"], got["score"])
        assert labels == [entry["label"] for entry in expected]
        np.testing.assert_allclose(scores, [entry["score"] for entry in expected], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 9, None])
def test_single_label_scores_are_the_pipelines(single: str, top_k: int | None) -> None:
    assert_like_the_pipeline(single, top_k=top_k)


def test_pairs_of_texts(single: str) -> None:
    assert_like_the_pipeline(single, PAIRS, top_k=None)


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_multi_label_scores_are_independent(tmp_path: Path, top_k: int | None) -> None:
    assert_like_the_pipeline(tiny_bert(tmp_path, 4, "multi_label_classification"), top_k=top_k)


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_one_label_is_a_sigmoid_unless_it_is_a_regression(tmp_path: Path, problem: str | None) -> None:
    assert_like_the_pipeline(tiny_bert(tmp_path, 1, problem))


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_the_function_can_be_chosen(single: str, function: str) -> None:
    assert_like_the_pipeline(single, top_k=None, function_to_apply=function)


def test_scores_that_are_equal_keep_the_order_of_the_labels(tmp_path: Path) -> None:
    # Through a sigmoid in float32, large logits all become 1.
    folder = tiny_bert(tmp_path, 8, "multi_label_classification", initializer_range=5.0)
    table = run(make(TextClassification, folder, top_k=None), {"text": TEXTS})
    assert any(scores.count(1.0) > 1 for scores in table["score"].to_pylist())
    assert_like_the_pipeline(folder, top_k=None)


@pytest.mark.parametrize("pad_token", [None, "<pad>"])
def test_causal_models_score_the_last_token_with_and_without_a_padding_token(
    tmp_path: Path, pad_token: str | None
) -> None:
    assert_like_the_pipeline(tiny_llama_classifier(tmp_path, pad_token=pad_token), top_k=None)


def test_the_schema_follows_top_k(single: str) -> None:
    one = make(TextClassification, single)
    assert one.output_fields() == [pa.field("label", pa.string()), pa.field("score", pa.float32())]
    kinds = [field.type for field in make(TextClassification, single, top_k=2).output_fields()]
    assert kinds == [pa.list_(pa.string()), pa.list_(pa.float32())]


def test_a_length_beyond_the_models_is_refused(single: str) -> None:
    assert "at most 64" in make(TextClassification, single, max_length=65).check()[0]


def test_long_rows_are_cut_and_counted(single: str) -> None:
    task = make(TextClassification, single)
    assert features_of(task, {"text": TEXTS}).truncated == 1
    features = features_of(task, {"text": ["megabyte " * 110_000, "a"], "text_pair": ["b", "c"]})
    assert features.truncated == 1
    assert task.lengths(features.table).tolist() == [64, 5]


def test_batches_order_and_padding_do_not_change_a_row(single: str) -> None:
    task = make(TextClassification, single, top_k=None)
    expected = run(task, {"text": TEXTS}, size=1)
    for size, multiple, order in [(4, 1, None), (9, 8, range(9)[::-1]), (3, 16, [4, 0, 8, 2, 6, 1, 7, 3, 5])]:
        got = run(task, {"text": TEXTS}, size, multiple, order)
        assert got["label"].equals(expected["label"])
        scores = [np.array(table["score"].to_pylist()) for table in (got, expected)]
        np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4, atol=1e-6)


def test_the_report_draws_the_best_score(single: str) -> None:
    best = run(make(TextClassification, single), {"text": TEXTS})["score"].to_numpy()
    for top_k in (1, None):
        np.testing.assert_allclose(
            measured(make(TextClassification, single, top_k=top_k), {"text": TEXTS}), best, rtol=1e-5
        )


def test_wrong_params_name_the_choices() -> None:
    with pytest.raises(ValidationError, match="'default', 'softmax', 'sigmoid' or 'none'"):
        TextClassification.Params(function_to_apply="sofmax")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TextClassification.Params(top_k=0)


def ending_texts(folder: str, **tokens: Any) -> str:
    """Has the tokenizer end every text with `</s>`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return folder


def causal(folder: Path, kind: str) -> str:
    """A causal classifier whose config has no padding id, or one that is no token; texts end with `</s>`."""
    if kind == "GPT2":
        tokenizer = bytes_tokenizer(128)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
        tokens = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
        config = GPT2Config(**sizes, **tokens, pad_token_id=None, num_labels=3)
        return ending_texts(save(folder, GPT2ForSequenceClassification(config), tokenizer))
    made = tiny_llama_classifier(folder, **({"pad_token_id": -1} if kind == "Llama, -1" else {}))
    return ending_texts(made, **({"pad_token": "</s>"} if kind == "Llama, padded with the end" else {}))


ENDING = [*TEXTS, "already ended </s>", "</s></s>", "twice </s></s>"]


@pytest.mark.parametrize("kind", ["Llama", "Llama, -1", "Llama, padded with the end", "GPT2"])
def test_the_last_token_is_known_by_the_mask_where_padding_has_no_id(tmp_path: Path, kind: str) -> None:
    folder = causal(tmp_path, kind)
    task = make(TextClassification, folder, top_k=None)
    table = run(task, {"text": ENDING}, size=5, multiple=8)
    for got, expected in zip(table.to_pylist(), oracle(folder, ENDING, top_k=None), strict=True):
        assert got["label"] == [entry["label"] for entry in expected]
        np.testing.assert_allclose(got["score"], [entry["score"] for entry in expected], rtol=1e-4, atol=1e-6)


def test_a_causal_cross_encoder_reads_the_last_token_too(tmp_path: Path) -> None:
    folder = ending_texts(tiny_llama_classifier(tmp_path, num_labels=1))
    documents = [["short", CORPUS[3], "a </s>"], [], [CORPUS[5]]]
    task = make(TextRanking, folder, activation="none")
    rows = {"query": pa.array(CORPUS[:3]), "documents": pa.array(documents, pa.list_(pa.string()))}
    found = run(task, rows, size=4, multiple=8)["scores"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for query, texts, scores in zip(CORPUS[:3], documents, found, strict=True):
        expected = [
            float(model(**tokenizer(query, text, return_tensors="pt")).logits.detach()) for text in texts
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
