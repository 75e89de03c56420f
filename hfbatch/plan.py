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
from hfbatch.compute.identity import earlier, job_identity
from hfbatch.compute.named_files import named_files
from hfbatch.compute.worker import Settled, WorkOrder
from hfbatch.data.columns import storage_type
from hfbatch.data.filesystem import absolute, lies_in, one_line, printable, real_path
from hfbatch.data.ledger import Ledger, State, types_of
from hfbatch.data.listing import reads
from hfbatch.data.lock import guard_note
from hfbatch.data.media_files import RowFiles, with_absolute_paths
from hfbatch.data.models import Model, pin
from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults
from hfbatch.data.rejects import reject_schema
from hfbatch.data.source import Source, open_source
from hfbatch.data.splits import Split
from hfbatch.data.writer import stored_schema
from hfbatch.errors import SpecError, SplitError
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
        return reject_schema(self.read.schema, lines=self.read.format != "parquet")

    def job(self) -> dict[str, Any]:
        """The content of job.json: no secrets, no object that is not plain."""
        parameters, stored = self.model.size()
        spec = self.spec.model_dump(mode="json")
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
            "left_out": self.source.left_out,
            "types": self.source.types,
            "versions": versions(),
        }


def make_plan(spec: JobSpec, overwrite: bool = False) -> Plan:
    """Checks everything and cuts the work. :raises SpecError: with every fault found."""
    faults: list[str] = []
    spec = _with_absolute_paths(spec)
    model = task = source = None
    notes: list[str] = []
    ledger = Ledger(spec.output.path)
    with gather(faults):
        source = open_source(spec.input, None if overwrite else _types_kept(ledger))
        notes += source.notes
    with gather(faults):
        model = pin(spec.model)
    with gather(faults):
        spec = name_task(spec, model, notes)
        task = check_task(spec, model, faults, notes)
    inputs, keep = {}, []
    if source and task:
        inputs = _bind_inputs(spec, source, task, faults)
        keep = _bind_keep(spec, source, faults)
        faults += filter_faults(spec.input.filter, source.schema) if spec.input.filter else []
        conflicts = source.faults_of(_columns_read(spec, source, inputs, keep))
        hint = ", or name the columns to keep in output.keep" if spec.output.keep is None else ""
        faults += [conflict + hint for conflict in conflicts]
        schema = _output_schema(spec, source, task, inputs, keep, faults)
    faults += _output_faults(spec, ledger, overwrite, notes)
    with gather(faults):
        faults += _overlap(spec)
    if faults or source is None or task is None or model is None:
        raise SpecError(list(dict.fromkeys(faults)))

    task.files = RowFiles(source.root_url, spec.input.files)
    identity = job_identity(spec, model, task, inputs, keep)
    splits = source.cut(split_rows(spec), spec.input.limit)
    state = State([], list(splits), []) if overwrite else ledger.state(splits)
    settled = None
    if not overwrite:
        identity, settled = earlier(ledger, identity, spec, state)
    read = _read_plan(spec, source, inputs, keep)
    faults, more = named_files(task, inputs, state.todo, read, spec.rejects.max_fraction)
    if faults:
        raise SpecError(faults)
    return Plan(
        spec, model, task, source, splits, state, ledger, read, inputs, keep, schema,
        identity, settled, overwrite, notes + task.notes() + left_out_notes(source) + more,
    )  # fmt: skip


def look_again(plan: Plan) -> None:
    """Brings a plan up to date with the output, which this process holds by now: its job, and which parts are done.

    The parts' footers are read: names, which the plan went by, do not tell whose a part is.

    :raises SpecError: if the output holds the parts of another job by now.
    """
    if not plan.overwrite:
        plan.state, _, _ = plan.ledger.audit(plan.splits, plan.fingerprint)
        plan.identity, plan.settled = earlier(plan.ledger, plan.identity, plan.spec, plan.state)


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
        faults.append(f"output.truncated: there is a column {flag!r} already; give another name")
    return pa.schema([*fields, *([pa.field(flag, pa.bool_())] if flag else [])])


def _output_faults(spec: JobSpec, ledger: Ledger, overwrite: bool, notes: list[str]) -> list[str]:
    """What is wrong with the output; what to mind about it goes to notes."""
    shown = spec.output.path
    fault = ledger.check_writable()
    if fault:
        return [fault]
    try:
        notes += [note for note in [guard_note(spec.output.path)] if note]
    except OSError as error:
        return [
            f"output {shown} cannot be locked: {one_line(error)}; give access to it, or choose another output"
        ]
    foreign = ledger.foreign()
    if foreign:
        return [
            f"output {shown} holds files that hfbatch did not write: {some(foreign)}; choose another folder"
        ]
    if ledger.holds_training():
        return [f"output {shown} holds a fine-tuning; choose another folder"]
    if not overwrite and ledger.read_job() is None and ledger.list_parts():
        return [f"output {shown} holds parts of an unknown job (no _hfbatch/job.json); use --overwrite"]
    return []


def _overlap(spec: JobSpec) -> list[str]:
    """The fault of an output that holds the input, or is held by it."""
    source, target = spec.input.path, spec.output.path
    if reads(source, target):
        return [
            f"output.path {target} lies in the input's folder, where the next run would read it; choose a folder "
            "outside, or an input such as *.parquet that leaves it out"
        ]
    if lies_in(real_path(source), real_path(target)):
        return [f"input.path {source} lies in the output {target}; choose another output"]
    return []


def _columns_read(spec: JobSpec, source: Source, inputs: dict[str, str], keep: list[str]) -> set[str]:
    filtered = filter_columns(spec.input.filter, source.schema) if spec.input.filter else ()
    return {*inputs.values(), *keep, *filtered}


def _types_kept(ledger: Ledger) -> dict[str, Any]:
    """Types of the input's columns in the parts of an earlier run: the same values have the same types in every part."""
    try:
        return (ledger.read_job() or {}).get("types", {}) if ledger.list_parts() else {}
    except (OSError, SplitError):
        return {}  # told where the output is checked


def _read_plan(spec: JobSpec, source: Source, inputs: dict[str, str], keep: list[str]) -> ReadPlan:
    wanted = _columns_read(spec, source, inputs, keep)
    columns = tuple(name for name in source.schema.names if name in wanted)
    schema = pa.schema([source.schema.field(name) for name in columns])
    hive = {name: kind for name, kind in source.hive.items() if name in columns}
    return ReadPlan(
        source.root_url, source.format, columns, schema, hive, spec.input.filter,
        given=source.given & set(columns), whole=spec.output.keep is None,
    )  # fmt: skip


def left_out_notes(source: Source, section: str = "input") -> list[str]:
    """What a listing leaves out, as notes of a plan. :param section: the part of the spec that has the path."""
    return [f"left out of {section}: {line}" for line in source.left_out]


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
