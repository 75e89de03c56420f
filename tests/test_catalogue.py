"""What `hfbatch tasks` says of every task: all of it is there, and the example fits the task."""

from __future__ import annotations

import pyarrow as pa
import pytest

from hfbatch.catalogue import describe_task
from hfbatch.spec import JobSpec
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


def test_aliases_are_tasks() -> None:
    assert set(aliases()).isdisjoint(TASKS)
    assert task_class("ner").name == "token-classification"
