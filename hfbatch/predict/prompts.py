"""Binds `params.template` and `params.messages`: the task's input that they render, and the columns that they read."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from jinja2 import TemplateSyntaxError

from hfbatch.data.formats.columns import storage_type
from hfbatch.data.rendering import RenderedColumn
from hfbatch.data.source import Source
from hfbatch.spec.job import JobSpec
from hfbatch.spec.prompts import RENDERING, MessageTemplate
from hfbatch.tasks.base import InputColumn, Task

SHOWN = 60
"""Characters of a template in errors."""


def bind_prompt(
    spec: JobSpec, source: Source, task: Task, faults: list[str]
) -> tuple[InputColumn, RenderedColumn] | None:
    """Returns the input that a param renders, and its column; None if none does.

    :param faults: gets everything that is wrong.
    """
    found = rendered_input(task, faults)
    if found is None:
        return None
    param, column, made = found
    mapped = [name for name in spec.input.columns if name in replaced(column, task)]
    if mapped:
        faults.append(
            f"params.{param} gives the input {column.name!r} of the task; leave {', '.join(mapped)} out of "
            f"input.columns, or leave params.{param} out"
        )
    if made.name in source.schema.names:
        faults.append(f"input has a column {made.name!r}, the name of what params.{param} renders; rename it")
    faults += _column_faults(made, param, source)
    return column, made


def rendered_input(task: Task, faults: list[str]) -> tuple[str, InputColumn, RenderedColumn] | None:
    """Returns the param that renders an input, that input and its column; None if there is none, or one with an error.

    :param faults: gets everything that is wrong with the params, whatever the rows.
    """
    given = [name for name in RENDERING if getattr(task.params, name, None) is not None]
    if not given:
        return None
    param, *others = given
    if others:
        faults.append(f"params.{param} and params.{others[0]} both give the input of the task; leave one out")
    column = next((one for one in task.columns() if one.rendered_by == param), None)
    if column is None:
        faults.append(f"params.{param}: model {task.model.name!r} reads no text; leave it out")
        return None
    template, kind = _template(getattr(task.params, param))
    if not column.accepts(kind):
        faults.append(
            f"params.{param}: task {task.name} takes {column.wants}; write each content as one text"
        )
    made = RenderedColumn(f"hfbatch_{column.name}", template, kind)
    try:
        _ = made.columns
    except TemplateSyntaxError as error:
        faults.append(f"params.{param}, line {error.lineno} of the template: {error.message}")
        return None
    return param, column, made


def replaced(column: InputColumn, task: Task) -> set[str]:
    """Returns the inputs for which no column is read if one is rendered: itself, and its alternatives."""
    return {column.name, *(task.exclusive if column.name in task.exclusive else ())}


def _template(given: str | tuple[MessageTemplate, ...]) -> tuple[Any, pa.DataType]:
    """Returns the templates as plain values, and the type that they render to. If a message has parts, all have."""
    if isinstance(given, str):
        return given, pa.string()
    messages = [message.model_dump() for message in given]
    if all(isinstance(message["content"], str) for message in messages):
        return messages, pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    for message in messages:
        content = message["content"]
        message["content"] = [{"type": "text", "text": content}] if isinstance(content, str) else [*content]
    parts = pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))
    return messages, pa.list_(pa.struct({"role": pa.string(), "content": parts}))


def _column_faults(column: RenderedColumn, param: str, source: Source) -> list[str]:
    """Returns errors for columns that are missing or hold no printable values."""
    faults, has = [], ", ".join(source.schema.names)
    for name in sorted(column.columns):
        if name not in source.schema.names:
            text = " ".join(str(column.template).split())
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            faults.append(
                f"params.{param} names the column {name!r}, which is not in input (has: {has}): {shown}"
            )
            continue
        kind = storage_type(source.schema.field(name).type)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            faults.append(
                f"params.{param} names the column {name!r}, which is {kind} and no text; leave it out"
            )
        if lacking := source.files_without(name):
            faults.append(
                f"column {name!r} is missing from {lacking[0]}, and params.{param} names it; add it there"
            )
    return faults
