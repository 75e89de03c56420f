"""What the tasks are, for people: `hfbatch tasks`."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table

from hfbatch.tasks import TASKS, task_class


def list_tasks() -> list[dict[str, Any]]:
    """Every task in full."""
    return [describe_task(name) for name in TASKS]


def describe_task(name: str) -> dict[str, Any]:
    """One task in full. :raises SpecError: for an unknown name."""
    cls = task_class(name)
    params = {
        key: {
            "type": _type(field.annotation),
            "required": field.is_required(),
            "default": None
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True)),
            "help": field.description,
        }
        for key, field in cls.Params.model_fields.items()
    }
    example = {"task": cls.name, "model": "org/model-or-folder", "input": "in/", "output": "out/"}
    return {
        "name": cls.name,
        "summary": cls.summary,
        "aliases": list(cls.aliases),
        "model": cls.auto_class,
        "inputs": [
            {"name": column.name, "type": column.wants, "required": column.required} for column in cls.inputs
        ],
        "params": params,
        "outputs": dict(cls.outputs),
        "example": example | ({"params": dict(cls.EXAMPLE.params)} if cls.EXAMPLE.params else {}),
    }


def render_tasks(tasks: list[dict[str, Any]], console: Console) -> None:
    """Prints the list."""
    table = Table(Column("task", no_wrap=True), "what it does", "inputs")
    for task in tasks:
        inputs = ", ".join(column["name"] for column in task["inputs"])
        table.add_row(f"[bold]{task['name']}[/]", task["summary"], inputs)
    console.print(table)
    console.print("`hfbatch tasks NAME` shows one in full.", highlight=False)


def render_task(task: dict[str, Any], console: Console) -> None:
    """Prints one task."""
    console.print(f"[bold]{task['name']}[/]: {task['summary']} (loads {task['model']})", highlight=False)
    if task["aliases"]:
        console.print(f"also called {', '.join(task['aliases'])}", highlight=False)
    columns = Table("input column", "type", "needed")
    for column in task["inputs"]:
        columns.add_row(column["name"], column["type"], "yes" if column["required"] else "no")
    params = Table("param", "type", "default", "what it does")
    for name, param in task["params"].items():
        default = "needed" if param["required"] else str(param["default"])
        params.add_row(name, param["type"], default, param["help"])
    outputs = Table("output column", "type")
    for name, kind in task["outputs"].items():
        outputs.add_row(name, kind)
    for table in (columns, params, outputs):
        console.print(table)
    console.print(
        Syntax(yaml.safe_dump(task["example"], sort_keys=False), "yaml", background_color="default")
    )


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
