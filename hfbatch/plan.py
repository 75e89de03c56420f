"""The plan: the spec made concrete. Everything that can fail early fails here, all faults together.

Starts nothing and changes nothing. Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from hfbatch import __version__
from hfbatch.compute.checks import check_task, name_task
from hfbatch.compute.named_files import named_files
from hfbatch.compute.worker import Settled, WorkOrder
from hfbatch.data.filesystem import absolute, lies_in, redact
from hfbatch.data.ledger import Ledger, State, types_of
from hfbatch.data.media_files import RowFiles, with_absolute_paths
from hfbatch.data.models import Model, pin
from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults
from hfbatch.data.rejects import reject_schema
from hfbatch.data.source import Source, open_source
from hfbatch.data.splits import Split
from hfbatch.data.writer import stored_schema
from hfbatch.errors import SpecError
from hfbatch.spec import JobSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import InputColumn, Task

PACKAGES = ("torch", "transformers", "ray", "pyarrow", "numpy")


@dataclass
class Plan:
    """A job that is ready to start."""

    spec: JobSpec
    model: Model
    task: Task
    source: Source
    splits: list[Split]
    state: State
    """Which splits are done, to do, and which parts are stale."""
    ledger: Ledger
    read: ReadPlan
    inputs: dict[str, str]
    """Task input to dataset column."""
    keep: list[str]
    """Input columns copied to the output."""
    schema: pa.Schema
    """Schema of the parts."""
    identity: dict[str, Any]
    """What changes results."""
    settled: Settled | None
    """Choices of an earlier run on the same output."""
    overwrite: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The job in a few words."""
        return f"{self.spec.task} with {'/'.join(Path(self.model.name).parts[-2:])}"

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def rows(self) -> int:
        """Rows of the input, before the filter."""
        return sum(split.rows for split in self.splits)

    @property
    def todo(self) -> list[Split]:
        """Splits that are still to do and can be read."""
        return [split for split in self.state.todo if split.fault is None]

    @property
    def broken(self) -> list[Split]:
        """Splits whose file cannot be read."""
        return [split for split in self.splits if split.fault is not None]

    @property
    def order(self) -> WorkOrder:
        """What worker processes need."""
        return WorkOrder(self.spec, self.model, self.settled, self.source.root_url)

    @property
    def rejects_schema(self) -> pa.Schema:
        """Schema of the reject files."""
        return reject_schema(self.read.schema)

    def job(self) -> dict[str, Any]:
        """The content of job.json: no secrets, no object that is not plain."""
        parameters, stored = self.model.size()
        spec = self.spec.model_dump(mode="json")
        for section in ("input", "output"):
            spec[section]["path"] = redact(spec[section]["path"])
        spec["input"]["files"]["roots"] = [redact(root) for root in self.spec.input.files.roots]
        return {
            "hfbatch": __version__,
            "spec": spec,
            "identity": self.identity,
            "fingerprint": self.fingerprint,
            "model": {
                "name": self.model.name,
                "commit": self.model.commit,
                "parameters": parameters,
                "bytes": stored,
            },
            "settled": vars(self.settled) if self.settled else None,
            "split_rows": split_rows(self.spec),
            "histogram": {"name": self.task.histogram.name, "edges": list(self.task.histogram.edges)},
            "schema": types_of(stored_schema(self.schema)),
            "versions": versions(),
        }


def make_plan(spec: JobSpec, overwrite: bool = False) -> Plan:
    """Checks everything and cuts the work. :raises SpecError: with every fault found."""
    faults: list[str] = []
    spec = _with_absolute_paths(spec)
    model = task = source = None
    notes: list[str] = []
    with gather(faults):
        source = open_source(spec.input)
    with gather(faults):
        model = pin(spec.model)
    with gather(faults):
        spec = name_task(spec, model, notes)
        task = check_task(spec, model, faults, notes)
    ledger = Ledger(spec.output.path)
    inputs, keep = {}, []
    if source and task:
        inputs = _bind_inputs(spec, source, task, faults)
        keep = _bind_keep(spec, source, faults)
        faults += filter_faults(spec.input.filter, source.schema) if spec.input.filter else []
        schema = _output_schema(spec, source, task, inputs, keep, faults)
    faults += _output_faults(spec, ledger, overwrite)
    if lies_in(spec.output.path, spec.input.path):
        faults.append(
            f"output.path {redact(spec.output.path)} lies in the input's folder, where the next run would read it; "
            "choose a folder outside"
        )
    if faults or source is None or task is None or model is None:
        raise SpecError(list(dict.fromkeys(faults)))

    task.files = RowFiles(source.root_url, spec.input.files)
    identity = _identity(spec, model, task, inputs, keep)
    settled = None
    if not overwrite:
        settled = _earlier(ledger, identity, spec)
    splits = source.cut(split_rows(spec), spec.input.limit)
    state = State([], list(splits), []) if overwrite else ledger.state(splits)
    read = _read_plan(spec, source, inputs, keep)
    faults, more = named_files(task, inputs, state.todo, read, spec.rejects.max_fraction)
    if faults:
        raise SpecError(faults)
    return Plan(
        spec, model, task, source, splits, state, ledger, read, inputs, keep, schema,
        identity, settled, overwrite, notes + task.notes() + more,
    )  # fmt: skip


def split_rows(spec: JobSpec) -> int:
    """Rows of a split: the spec's, else the task's."""
    return spec.input.split_rows or task_class(spec.task).split_rows


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


@contextmanager
def gather(faults: list[str]) -> Iterator[None]:
    """Collects the faults of a SpecError that the block raises."""
    try:
        yield
    except SpecError as error:
        faults.extend(error.faults)


def _with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Workers run in another folder, on other machines perhaps."""
    return spec.model_copy(
        update={
            "input": with_absolute_paths(spec.input),
            "output": spec.output.model_copy(update={"path": absolute(spec.output.path)}),
        }
    )


def _bind_inputs(spec: JobSpec, source: Source, task: Task, faults: list[str]) -> dict[str, str]:
    """Task input to dataset column, for those that are there."""
    found = bind_columns(
        spec.input.columns, source, task.columns(), faults, f"task {task.name}", task.exclusive
    )
    faults += task.column_faults(set(found))
    return found


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
        if not column.accepts(kind) and not pa.types.is_null(kind):
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
        faults.append(f"output.truncated: there is a column {flag!r} already; give another name")
    return pa.schema([*fields, *([pa.field(flag, pa.bool_())] if flag else [])])


def _output_faults(spec: JobSpec, ledger: Ledger, overwrite: bool) -> list[str]:
    fault = ledger.check_writable()
    if fault:
        return [fault]
    foreign = ledger.foreign()
    if foreign:
        return [
            f"output {redact(spec.output.path)} holds files that hfbatch did not write: {some(foreign)}; choose another folder"
        ]
    if not overwrite and ledger.read_job() is None and ledger.list_parts():
        return [
            f"output {redact(spec.output.path)} holds parts of an unknown job (no _hfbatch/job.json); use --overwrite"
        ]
    return []


def _identity(
    spec: JobSpec, model: Model, task: Task, inputs: dict[str, str], keep: list[str]
) -> dict[str, Any]:
    """What changes results. Workers, batch sizes and paths do not."""
    tokenizer = spec.tokenizer.model_dump(mode="json", exclude_defaults=True)
    flag = {"truncated": spec.output.truncated_column} if spec.output.truncated else {}
    files = spec.input.files.model_dump(mode="json", exclude_defaults=True, exclude={"timeout"})
    return {
        "task": spec.task,
        "model": {"commit": model.commit, "dtype": spec.model.dtype},
        "engine": "torch",
        "params": task.params.model_dump(mode="json"),
        "batch": {"max_length": spec.batch.max_length},
        "input": {"columns": inputs, "filter": spec.input.filter, **({"files": files} if files else {})},
        "output": {"keep": keep, "prefix": spec.output.prefix, **flag},
        "seed": spec.seed,
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def _earlier(ledger: Ledger, identity: dict[str, Any], spec: JobSpec) -> Settled | None:
    """Choices of an earlier run. :raises SpecError: if the output holds another job's parts."""
    job = ledger.read_job()
    if job is None:
        return None
    differing = list(_differences(job["identity"], identity))
    if differing and ledger.list_parts():
        raise SpecError(
            f"output {redact(spec.output.path)} holds the parts of another job; "
            f"it differs in {'; '.join(differing)}. Choose another output, or replace it with --overwrite"
        )
    if differing or not job["settled"]:
        return None
    settled = Settled(**job["settled"])
    size = settled.batch_size if spec.batch.size == "auto" else spec.batch.size
    return Settled(size, settled.dtype, settled.device)


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} (there: {old!r}, now: {new!r})"


def _read_plan(spec: JobSpec, source: Source, inputs: dict[str, str], keep: list[str]) -> ReadPlan:
    wanted = {*inputs.values(), *keep}
    if spec.input.filter:
        wanted |= set(filter_columns(spec.input.filter, source.schema))
    columns = tuple(name for name in source.schema.names if name in wanted)
    schema = pa.schema([source.schema.field(name) for name in columns])
    hive = {name: kind for name, kind in source.hive.items() if name in columns}
    return ReadPlan(source.root_url, source.format, columns, schema, hive, spec.input.filter)


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
