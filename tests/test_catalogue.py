"""What `hfbatch tasks` says of every task: all of it is there, and the example fits the task."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pytest
from rich.console import Console

from hfbatch.cli.catalogue import describe_task, list_tasks, render_task
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import TASKS, aliases, task_class


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_takes_and_gives(name: str) -> None:
    task = describe_task(name)
    assert task["name"] == name
    assert task["summary"]
    assert task["outputs"]
    assert all(param["help"] for param in task["params"].values())
    assert JobSpec.build(task["example"]).task == name


@pytest.mark.parametrize("name", TASKS)
def test_the_example_of_a_task_is_one_that_it_takes(name: str) -> None:
    cls = task_class(name)
    cls.Params.model_validate(dict(cls.EXAMPLE.params))
    inputs = {column.name: column for column in cls.inputs}
    assert len({len(rows) for rows in cls.EXAMPLE.rows.values()}) == 1
    for column, rows in cls.EXAMPLE.rows.items():
        assert inputs[column].accepts(pa.array(rows).type)


def test_the_list_holds_every_task_in_full_and_is_plain_json() -> None:
    found = list_tasks()
    assert found == [describe_task(name) for name in TASKS]
    assert json.loads(json.dumps(found)) == found
    (zero_shot,) = [task for task in found if task["name"] == "zero-shot-classification"]
    params = zero_shot["params"]
    assert (params["multi_label"]["required"], params["multi_label"]["default"]) == (False, False)
    assert zero_shot["inputs"] == [
        {"name": "text", "type": "string", "required": True},
        {"name": "candidate_labels", "type": "list<string>", "required": False},
    ]
    params = describe_task("zero-shot-image-classification")["params"]
    assert (params["candidate_labels"]["required"], params["candidate_labels"]["default"]) == (True, None)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ner", "aliases: ner"),
        ("translation_en_to_de", "aliases: translation_xx_to_yy"),
        ("zero-shot-image-classification", "required"),
    ],
)
def test_a_task_is_shown_with_its_other_names_and_what_it_needs(name: str, shown: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    render_task(describe_task(name), console)
    assert shown in console.file.getvalue()


def test_aliases_are_tasks() -> None:
    assert set(aliases()).isdisjoint(TASKS)
    assert task_class("ner").name == "token-classification"
