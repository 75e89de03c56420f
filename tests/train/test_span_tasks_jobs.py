"""Training that finds spans, whole: from Parquet to a model that predicts the spans that it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.metrics.answers import exact_match
from hfbatch.train.run import FinetuneResult
from tests.train.tools import finetune_here, predicted

Phrases = list[tuple[str, str]]
PARTS = {
    "who": ["The engineer", "A quiet river", "Our nightly job"],
    "": ["reads the blue mountain", "slowly crosses a table of numbers", "does not forget the blue mountain"],
    "when": ["before dawn", "on Monday"],
}
"""What sentences are made of; what has a name is looked for."""


def sentences(rows: int) -> list[Phrases]:
    """Sentences as phrases with their names."""
    random = np.random.default_rng(rows)
    return [[(str(random.choice(phrases)), kind) for kind, phrases in PARTS.items()] for _ in range(rows)]


def text_of(sentence: Phrases) -> str:
    return " ".join(phrase for phrase, _ in sentence)


def train(task: str, model: str, folder: Path, tables: dict[str, pa.Table], **options: Any) -> FinetuneResult:
    """Trains on one table and measures with the other; without dropout."""
    for part, table in tables.items():
        pq.write_table(table, folder / f"{part}.parquet")
    spec = {
        "task": task,
        "model": {"name": model, "overrides": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}},
        "train": str(folder / "train.parquet"),
        "eval": str(folder / "eval.parquet"),
        "output": str(folder / "out"),
        "compute": {"dtype": "float32"},
        "workers": {"count": 1, "cpus": 1},
        **options,
    }
    return finetune_here(FinetuneSpec.build(spec))


def test_a_model_of_tags_finds_their_spans(encoder: str, tmp_path: Path) -> None:
    tables = {}
    for part, rows in (("train", 64), ("eval", 21)):
        words = [
            [(word, f"I-{kind}" if kind else "O") for phrase, kind in sentence for word in phrase.split()]
            for sentence in sentences(rows)
        ]
        tokens, tags = ([[pair[side] for pair in row] for row in words] for side in (0, 1))
        texts = [" ".join(row) for row in tokens]
        tables[part] = pa.table({"text": texts, "tokens": tokens, "ner_tags": tags})
    columns = {"columns": {"tags": "ner_tags"}}
    result = train(
        "ner",
        encoder,
        tmp_path,
        tables,
        train={"path": str(tmp_path / "train.parquet"), **columns},
        eval={"path": str(tmp_path / "eval.parquet"), **columns},
        schedule={"epochs": 4, "learning_rate": 5e-3},
        batch={"size": 8},
    )
    assert result.metrics["data"]["labels"]["B-who"] == 64
    assert result.metrics["best"]["f1"] == 1 > result.metrics["before"]["f1"]
    assert result.metrics["baseline"]["f1"] == 0
    told = predicted(
        "token-classification", result.model, tmp_path / "eval.parquet", tmp_path / "found",
        aggregation_strategy="simple",
    )  # fmt: skip
    found = told["entities"].to_pylist()
    for sentence, entities in zip(sentences(21), found, strict=True):
        text = text_of(sentence)
        assert [(one["entity_group"], text[one["start"] : one["end"]]) for one in entities] == [
            (kind, phrase) for phrase, kind in sentence if kind
        ]


def test_a_model_of_answers_finds_them(encoder: str, tmp_path: Path) -> None:
    tables = {}
    for part, rows in (("train", 96), ("eval", 21)):
        columns: dict[str, list[Any]] = {"question": [], "context": [], "answers": [], "answer_starts": []}
        for number, sentence in enumerate(sentences(rows)):
            asked, text = ("who", "when", "what")[number % 3], text_of(sentence)
            texts = [phrase for phrase, kind in sentence if kind == asked]
            row = (f"{asked}?", text, texts, [text.index(answer) for answer in texts])
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value)
        tables[part] = pa.table(columns)
    result = train(
        "question-answering",
        encoder,
        tmp_path,
        tables,
        schedule={"epochs": 6, "learning_rate": 5e-3},
        batch={"size": 8, "max_length": 20},
        params={"doc_stride": 8},
    )
    rows = result.metrics["data"]["rows"]["eval"]
    assert rows["rows"] == 21 < rows["features"]
    assert rows["truncated"] == 0
    assert result.metrics["data"]["labels"] == {"answerable": 64, "unanswerable": 32}
    best = result.metrics["best"]
    assert best["f1"] >= 0.9 > result.metrics["before"]["f1"]
    assert best["accuracy_unanswerable"] >= 0.9
    assert result.metrics["baseline"]["f1"] == 7 / 21
    windows = {"max_seq_len": 20, "doc_stride": 8, "handle_impossible_answer": True}
    told = predicted(
        "question-answering", result.model, tmp_path / "eval.parquet", tmp_path / "found", **windows
    )
    answers = told["answers"].to_pylist()
    truths = [texts or [""] for texts in tables["eval"]["answers"].to_pylist()]
    right = [exact_match(truth[0], row[0]["answer"]) for truth, row in zip(truths, answers, strict=True)]
    assert np.mean(right) == best["exact_match"]
