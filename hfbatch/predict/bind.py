"""Binds a spec to its model, its task and its input: which columns are read, kept and written. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hfbatch.data.filesystem import printable
from hfbatch.data.formats.columns import storage_type
from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults
from hfbatch.data.rendering import RenderedColumn
from hfbatch.data.source import Source, open_source
from hfbatch.engines import kind_of
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model, pin
from hfbatch.hub.served import served_model
from hfbatch.predict.prompts import bind_prompt, replaced
from hfbatch.runtime.checks import check_task, name_task, readable
from hfbatch.runtime.machine import collector_at_rest
from hfbatch.spec.engines import HttpEngineSpec
from hfbatch.spec.job import JobSpec
from hfbatch.tasks.base import InputColumn, Task


@dataclass
class Bound:
    """A spec whose model, task and input go together."""

    spec: JobSpec
    """With the task's own name."""
    model: Model
    task: Task
    source: Source
    inputs: dict[str, str]
    """Task input to dataset column, or to the rendered one."""
    keep: list[str]
    """Input columns copied to the output."""
    schema: pa.Schema
    """Schema of the parts."""
    read: ReadPlan
    notes: list[str]


@collector_at_rest()
def bind(spec: JobSpec, types: Mapping[str, Any] | None, faults: list[str]) -> Bound | None:
    """Opens model and input, and binds the task to the input's columns.

    :param types: of columns in parts of an earlier run, which stay.
    :param faults: gets everything that is wrong; the result is None where that leaves nothing to go on with.
    """
    model = task = source = None
    notes: list[str] = []
    with gather(faults):
        source = open_source(spec.input, types)
        notes += source.notes
    with gather(faults):
        model = find_model(spec, notes)
    with gather(faults):
        spec = name_task(spec, model, notes)
        task = check_task(spec, model, source.root_url if source else "", faults, notes)
    if source is None or task is None or model is None:
        return None
    inputs, rendered = _bind_inputs(spec, source, task, faults)
    keep = _bind_keep(spec, source, faults)
    faults += filter_faults(spec.input.filter, source.schema) if spec.input.filter else []
    wanted = _columns_read(spec, source, inputs, keep, rendered)
    conflicts = source.faults_of(wanted)
    hint = ", or name the columns to keep in output.keep" if spec.output.keep is None else ""
    faults += [conflict + hint for conflict in conflicts]
    schema = _output_schema(spec, source, task, inputs, keep, faults)
    read = _read_plan(spec, source, wanted, rendered)
    return Bound(spec, model, task, source, inputs, keep, schema, read, notes)


def find_model(spec: JobSpec, notes: list[str]) -> Model:
    """Returns the model of a spec, with the files that the plan reads. :raises SpecError: if it cannot be used."""
    if isinstance(spec.engine, HttpEngineSpec):
        return served_model(spec.model, spec.engine, notes)
    model = readable(pin(spec.model, graphs=True, adapters=kind_of(spec.engine.name).adapters))
    if model.adapter:
        base = f"{model.base} at commit {model.base_commit}" if model.base else model.folder
        notes.append(f"model {model.name!r} is an adapter of {base}")
    return model


@contextmanager
def gather(faults: list[str]) -> Iterator[None]:
    """Collects the faults of a SpecError that the block raises."""
    try:
        yield
    except SpecError as error:
        faults.extend(error.faults)


def _bind_inputs(
    spec: JobSpec, source: Source, task: Task, faults: list[str]
) -> tuple[dict[str, str], RenderedColumn | None]:
    """Task input to column, for those that are there, and the column that is rendered."""
    prompt = bind_prompt(spec, source, task, faults)
    without = replaced(prompt[0], task) if prompt else set()
    columns = [column for column in task.columns() if column.name not in without]
    mapping = {name: column for name, column in spec.input.columns.items() if name not in without}
    found = bind_columns(mapping, source, columns, faults, f"task {task.name}", task.exclusive)
    if prompt:
        found[prompt[0].name] = prompt[1].name
    faults += task.column_faults(set(found))
    return found, prompt[1] if prompt else None


def bind_columns(
    mapping: Mapping[str, str],
    source: Source,
    columns: Sequence[InputColumn],
    faults: list[str],
    reader: str,
    exclusive: Sequence[str] = (),
) -> dict[str, str]:
    """What is read to dataset column, for those that are there; what is wrong goes to faults.

    :param mapping: what the spec says of it.
    :param reader: who reads, for errors.
    :param exclusive: of which one is read; one that is mapped goes before one found by its name.
    """
    known = {column.name: column for column in columns}
    has = ", ".join(source.schema.names)
    for name in mapping:
        if name not in known:
            faults.append(f"input.columns: {reader} has no input {name!r} (it has: {', '.join(known)})")
    found = {}
    chosen = set(exclusive) & set(mapping)
    for name, column in known.items():
        dataset = mapping.get(name, name)
        if name not in mapping and (not column.by_name or (name in exclusive and chosen)):
            continue
        if dataset not in source.schema.names:
            if column.required or name in mapping:
                hint = (
                    f", which input.columns names for {name!r}"
                    if name in mapping
                    else f"; use --column {name}=COLUMN"
                )
                faults.append(f"column {dataset!r} not in input (has: {has}){hint}")
            continue
        found[name] = dataset
        kind = source.schema.field(dataset).type
        if not column.accepts(storage_type(kind)) and not pa.types.is_null(kind):
            faults.append(
                f"column {dataset!r} is {kind}; {reader} takes {column.wants} as {name!r}; "
                f"use --column {name}=COLUMN with another column"
            )
        lacking = source.files_without(dataset)
        if lacking:
            faults.append(
                f"column {dataset!r} is missing from {some(lacking)}; leave these files out or add it"
            )
    return found


def _bind_keep(spec: JobSpec, source: Source, faults: list[str]) -> list[str]:
    names = source.schema.names
    if spec.output.keep is None:
        return list(names)
    for name in spec.output.keep:
        if name not in names:
            faults.append(f"output.keep: column {name!r} not in input (has: {', '.join(names)})")
    return [name for name in spec.output.keep if name in names]


def _output_schema(
    spec: JobSpec,
    source: Source,
    task: Task,
    inputs: dict[str, str],
    keep: Sequence[str],
    faults: list[str],
) -> pa.Schema:
    fields = [source.schema.field(name) for name in keep]
    for column in task.fields_for(set(inputs)):
        name = spec.output.prefix + column.name
        if name in keep:
            faults.append(
                f"output column {name!r} is also an input column that is kept; "
                f"set output.prefix (such as 'pred_') or leave it out of output.keep"
            )
        fields.append(column.with_name(name))
    flag = spec.output.truncated_column
    if flag in [field.name for field in fields]:
        faults.append(f"output.truncated: column {flag!r} exists already; give another name")
    return pa.schema([*fields, *([pa.field(flag, pa.bool_())] if flag else [])])


def _columns_read(
    spec: JobSpec, source: Source, inputs: dict[str, str], keep: list[str], rendered: RenderedColumn | None
) -> set[str]:
    filtered = filter_columns(spec.input.filter, source.schema) if spec.input.filter else ()
    return {*inputs.values(), *(rendered.columns if rendered else ()), *keep, *filtered}


def _read_plan(spec: JobSpec, source: Source, wanted: set[str], rendered: RenderedColumn | None) -> ReadPlan:
    columns = tuple(name for name in source.schema.names if name in wanted)
    schema = pa.schema([source.schema.field(name) for name in columns])
    hive = {name: kind for name, kind in source.hive.items() if name in columns}
    return ReadPlan(
        source.root_url, source.format, columns, schema, hive, spec.input.filter,
        given=source.given & set(columns), whole=spec.output.keep is None, rendered=rendered,
    )  # fmt: skip


def left_out_notes(source: Source, section: str = "input") -> list[str]:
    """What a listing leaves out, as notes of a plan. :param section: the part of the spec that has the path."""
    return [f"left out of {section}: {line}" for line in source.left_out]


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
