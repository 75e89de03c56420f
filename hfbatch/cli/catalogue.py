"""The descriptions of tasks that `hfbatch tasks` shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

import yaml
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from hfbatch.console.display import add, say, show
from hfbatch.console.display import table as headed
from hfbatch.tasks import ENDPOINT_TASKS, TASKS, task_class
from hfbatch.tasks.base import InputColumn, Params
from hfbatch.train.recipes import RECIPES, recipe_class


def list_tasks() -> list[dict[str, Any]]:
    """The descriptions of all tasks."""
    return [describe_task(name) for name in TASKS]


def describe_task(name: str) -> dict[str, Any]:
    """The description of one task. :raises SpecError: for an unknown name."""
    cls = task_class(name)
    example: dict[str, Any] = {
        "task": cls.name,
        "model": "org/model-or-folder",
        "input": "in/",
        "output": "out/",
    }
    if cls.name in ENDPOINT_TASKS:
        served = {"name": "http", "url": "http://localhost:8000/v1"}
        example |= {"model": "name-that-the-endpoint-lists", "engine": served}
    return {
        "name": cls.name,
        "summary": cls.summary,
        "aliases": list(cls.aliases),
        "model": cls.auto_class,
        "inputs": _columns(cls.inputs),
        "params": _params(cls.Params),
        "outputs": dict(cls.outputs),
        "training": _training(cls.name),
        "example": example | ({"params": dict(cls.EXAMPLE.params)} if cls.EXAMPLE.params else {}),
    }


def _training(name: str) -> dict[str, Any] | None:
    """Model class, columns and params of `hfbatch finetune` for a task; None if it cannot be trained."""
    if name not in RECIPES:
        return None
    recipe = recipe_class(name)
    return {
        "model": getattr(recipe, "auto_class", task_class(name).auto_class),
        "columns": _columns(recipe.columns),
        "params": _params(recipe.Params),
    }


def _columns(columns: Iterable[InputColumn]) -> list[dict[str, Any]]:
    return [{"name": column.name, "type": column.wants, "required": column.required} for column in columns]


def _params(params: type[Params], prefix: str = "") -> dict[str, Any]:
    """Each param, and the fields of those that are sections by their dotted names."""
    found = {
        prefix + key: {
            "type": _type(field.annotation),
            "required": field.is_required(),
            "default": None
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True)),
            "help": field.description,
        }
        for key, field in params.model_fields.items()
    }
    for key, field in params.model_fields.items():
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Params):
                found |= _params(kind, f"{prefix}{key}.")
    return found


def render_tasks(tasks: list[dict[str, Any]], console: Console) -> None:
    """Prints the list."""
    table = headed("task", "description", "inputs")
    table.columns[0].no_wrap = True
    for task in tasks:
        inputs = ", ".join(column["name"] for column in task["inputs"])
        add(table, (task["name"], "bold"), task["summary"], inputs)
    show(console, table)
    say(console, "`hfbatch tasks NAME` shows one task in full.")


def render_task(task: dict[str, Any], console: Console) -> None:
    """Prints one task."""
    say(console, (task["name"], "bold"), f": {task['summary']} (loads {task['model']})")
    if task["aliases"]:
        say(console, f"aliases: {', '.join(task['aliases'])}")
    outputs = headed("output column", "type")
    for name, kind in task["outputs"].items():
        add(outputs, name, kind)
    for table in (_columns_table(task["inputs"]), _params_table(task["params"]), outputs):
        show(console, table)
    training = task["training"]
    if training:
        command = f"hfbatch finetune {task['name']} TRAIN OUTPUT --model MODEL --eval ROWS"
        say(console, f"`{command}` trains it ({training['model']}):", wrap=False)
        show(console, _columns_table(training["columns"]))
        if training["params"]:
            show(console, _params_table(training["params"]))
    else:
        say(console, "This task cannot be trained.")
    example = yaml.safe_dump(task["example"], sort_keys=False)
    show(console, Syntax(example, "yaml", background_color="default"))


def _columns_table(columns: list[dict[str, Any]]) -> Table:
    table = headed("input column", "type", "required")
    for column in columns:
        add(table, column["name"], column["type"], "yes" if column["required"] else "no")
    return table


def _params_table(params: dict[str, Any]) -> Table:
    table = headed("param", "type", "default", "description")
    for name, param in params.items():
        default = "required" if param["required"] else str(param["default"])
        add(table, name, param["type"], default, " ".join((param["help"] or "").split()))
    return table


def _type(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return re.sub(r"\b(typing|hfbatch[\w.]*)\.", "", str(annotation))
