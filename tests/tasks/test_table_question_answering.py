"""Answers from tables are those of the pipeline for one row, in whatever form a table comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import pipeline

from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from hfbatch.tasks.text.table_question_answering import columns_of, is_table
from tests.models.multimodal import tiny_tapas
from tests.models.text import CORPUS, tiny_bert
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_pipeline_tasks import assert_alike

KIND: type[Task] = task_class("table-question-answering")
WAYS = {0: "NONE", 1: "SUM", 2: "COUNT"}
ASKED = ["who reads the river?", "how many numbers?", "what does not forget at 10:45 on Monday?"]


def table(k: int, rows: int) -> dict[str, list[str]]:
    """Words of sentences and numbers."""
    chosen = [CORPUS[(7 * k + row) % 72].split() for row in range(rows)]
    numbers = [str(k * row) for row in range(rows)]
    return {"who": [row[1] for row in chosen], "does": [row[2] for row in chosen], "times": numbers}


TABLES = [*(table(k, 1 + k % 4) for k in range(10)), table(1, 60), {"who": ["river " * 90], "times": ["1"]}]
QUESTIONS = [ASKED[k % 3] for k in range(len(TABLES))]
ROWS = {"table": [json.dumps(one) for one in TABLES], "question": QUESTIONS}


def answers(found: dict[str, Any]) -> tuple[Any, ...]:
    places = [{"row": row, "column": column} for row, column in found["coordinates"]]
    return found["answer"], places, found["cells"], found.get("aggregator")


@pytest.mark.parametrize("ways", [None, WAYS], ids=["cells", "aggregations"])
def test_cells_and_aggregators(tmp_path: Path, ways: dict[int, str] | None) -> None:
    folder = tiny_tapas(tmp_path, ways)
    task = make(KIND, folder)
    assert task.check() == []
    oracle = pipeline("table-question-answering", folder, device="cpu")
    expected = [answers(oracle(table=one, query=asked)) for one, asked in zip(TABLES, QUESTIONS, strict=True)]
    assert len({row[0] for row in expected}) > 4
    assert len({row[3] for row in expected}) == (2 if ways else 1)
    assert_alike(run(task, ROWS), expected)
    assert features_of(task, ROWS).truncated == 2
    assert measured(task, ROWS).tolist() == [len(row[2]) for row in expected]


def test_tables_come_as_columns_rows_and_json(tmp_path: Path) -> None:
    task = make(KIND, tiny_tapas(tmp_path, WAYS))
    chosen = [{**one, "never": None} for one in TABLES[:4]]
    rows = [
        [dict(zip(one, cells, strict=True)) for cells in zip(*one.values(), strict=True)]
        for one in TABLES[:4]
    ]
    forms = [chosen, rows, [json.dumps(one) for one in chosen], [json.dumps(one) for one in rows]]
    assert all(is_table(pa.array(form).type) for form in forms)
    found = [run(task, {"table": form, "question": QUESTIONS[:4]}).to_pylist() for form in forms]
    assert found == [found[0]] * 4
    assert columns_of('[{"a": 1}, {"b": 2.5, "a": null}]') == {"a": ["1", ""], "b": ["", "2.5"]}


def test_what_is_no_table_is_an_error(tmp_path: Path) -> None:
    for text, match in (
        ("3", "neither"),
        ('{"a": "b"}', "neither"),
        ('{"a": ["b"], "c": ["d", "e"]}', "cells"),
    ):
        with pytest.raises(ValueError, match=match):
            columns_of(text)
    task = make(KIND, tiny_tapas(tmp_path))
    with pytest.raises(ValueError, match="empty"):
        features_of(task, {"table": ["{}"], "question": ["who?"]})


def test_models_of_other_tasks_are_refused(tmp_path: Path) -> None:
    (fault,) = make(KIND, tiny_bert(tmp_path / "bert")).check()
    assert "BertForSequenceClassification" in fault
    assert "TAPAS" in fault
    (fault,) = make(KIND, tiny_tapas(tmp_path / "tapas"), max_length=97).check()
    assert "max_length 97" in fault


def test_the_example_runs(tmp_path: Path) -> None:
    task = make(KIND, tiny_tapas(tmp_path, WAYS))
    assert len(run(task, KIND.EXAMPLE.rows)) == 1
