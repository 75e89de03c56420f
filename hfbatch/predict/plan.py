"""Plans a job from its spec, and reports all faults together. Starts and changes nothing. Does not import Ray."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from hfbatch._version import __version__
from hfbatch.cluster.stage_job import StageJob
from hfbatch.data.filesystem import absolute, lies_in, one_line, real_path
from hfbatch.data.formats import FORMATS
from hfbatch.data.listing import reads
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.data.reader import ReadPlan
from hfbatch.data.source import Source
from hfbatch.data.splits import Split
from hfbatch.engines import ENGINES, kind_of
from hfbatch.errors import SpecError, SplitError
from hfbatch.hub.models import Model
from hfbatch.output.identity import digest
from hfbatch.output.layout import JOB
from hfbatch.output.ledger import Ledger, types_of
from hfbatch.output.lock import guard_note
from hfbatch.output.rejects import reject_schema
from hfbatch.output.sink import State
from hfbatch.output.sinks.parquet import ParquetSink
from hfbatch.output.writer import stored_schema
from hfbatch.predict.bind import bind, gather, left_out_notes, some
from hfbatch.predict.identity import earlier, job_identity
from hfbatch.predict.named_files import named_files
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.spec.job import JobSpec, WorkersSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task

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
    """Splits that are done and to do, and stale parts."""
    sink: ParquetSink
    read: ReadPlan
    inputs: dict[str, str]
    """Task inputs mapped to dataset columns."""
    keep: list[str]
    """Input columns copied to the output."""
    schema: pa.Schema
    """Schema of the parts."""
    identity: dict[str, Any]
    """The settings that change results."""
    choice: RuntimeChoice | None
    """The runtime choice of an earlier run on the same output."""
    overwrite: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        """The output folder."""
        return self.sink.ledger

    @property
    def title(self) -> str:
        """Short title of the job."""
        return f"{self.spec.task} with {'/'.join(Path(self.model.name).parts[-2:])}"

    @property
    def fingerprint(self) -> str:
        """Digest of the identity."""
        return digest(self.identity)

    @property
    def rows(self) -> int:
        """Rows of the input, before the filter."""
        return sum(split.rows for split in self.splits)

    @property
    def todo(self) -> list[Split]:
        """Splits that are not done and can be read."""
        return [split for split in self.state.todo if split.fault is None]

    @property
    def broken(self) -> list[Split]:
        """Splits whose file cannot be read."""
        return [split for split in self.splits if split.fault is not None]

    @property
    def runner(self) -> RunnerConfig:
        """The configuration of worker processes."""
        return RunnerConfig.of(self.spec, self.model, self.source.root_url, self.choice)

    @property
    def workers(self) -> WorkersSpec:
        """The workers of the spec; none takes what the engine cannot use."""
        spec = self.spec.workers
        kind = kind_of(self.spec.engine.name)
        changed: dict[str, Any] = {"gpus": 0} if spec.gpus == "auto" and not kind.gpus else {}
        if not kind.local:  # one has many requests under way, and keeps to one rate
            changed |= {"count": 1} if spec.count == "auto" else {}
            changed |= {"cpus": 1} if spec.cpus == "auto" else {}
        return spec.model_copy(update=changed)

    @property
    def threads(self) -> int | str:
        """Threads of a worker's model, of the spec."""
        return self.spec.engine.threads

    @property
    def compiles(self) -> bool:
        """Whether the spec has the model compiled."""
        return getattr(self.spec.engine, "compile", False) is True

    @property
    def rejects_schema(self) -> pa.Schema:
        """Schema of the reject files."""
        return reject_schema(self.read.schema, lines=FORMATS[self.read.format].load().lines)

    def stage_job(self) -> StageJob:
        """Returns the description of the job for the stages on the cluster."""
        return StageJob(
            runner=self.runner.to_json(),
            read=self.read,
            inputs=self.inputs,
            keep=tuple(self.keep),
            rows=sum(split.rows for split in self.todo),
            out=self.spec.output.path,
            schema=self.schema,
            truncated=self.spec.output.truncated_column,
            rejects_schema=self.rejects_schema,
            stamp={"fingerprint": self.fingerprint, "commit": self.model.commit},
            claim=self.ledger.claim,
        )

    def job(self) -> dict[str, Any]:
        """Returns the content of job.json: plain values without secrets."""
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
            "settled": vars(self.choice) if self.choice else None,
            "split_rows": split_rows(self.spec),
            "histogram": {"name": self.task.histogram.name, "edges": list(self.task.histogram.edges)},
            "schema": types_of(stored_schema(self.schema)),
            "left_out": self.source.left_out,
            "types": self.source.types,
            "versions": versions([*_packages(self.spec), *self.task.packages]),
        }


def make_plan(spec: JobSpec, overwrite: bool = False) -> Plan:
    """Checks the spec, model, input and output, and computes the splits. :raises SpecError: with every fault found."""
    faults: list[str] = []
    spec = _with_absolute_paths(spec)
    ledger = Ledger(spec.output.path)
    sink = ParquetSink(ledger)
    bound = bind(spec, None if overwrite else _types_kept(ledger), faults)
    notes = bound.notes if bound else []
    faults += _output_faults(spec, ledger, overwrite, notes)
    with gather(faults):
        faults += _overlap(spec)
    if faults or bound is None:
        raise SpecError(list(dict.fromkeys(faults)))

    spec, model, task, source = bound.spec, bound.model, bound.task, bound.source
    identity = job_identity(spec, model, task, bound.inputs, bound.keep)
    splits = source.cut(split_rows(spec), spec.input.limit)
    state = State([], list(splits), []) if overwrite else sink.state(splits)
    choice = None
    if not overwrite:
        identity, choice = earlier(ledger, identity, spec, state)
    faults, more = named_files(task, bound.inputs, state.todo, bound.read, spec.rejects.max_fraction)
    if faults:
        raise SpecError(faults)
    return Plan(
        spec, model, task, source, splits, state, sink, bound.read, bound.inputs, bound.keep, bound.schema,
        identity, choice, overwrite, notes + task.notes() + left_out_notes(source) + more,
    )  # fmt: skip


def look_again(plan: Plan) -> None:
    """Updates a plan from the output that this process now holds: its job, and which parts are done.

    Reads the parts' footers: names, on which the plan was based, do not show which job wrote a part.

    :raises SpecError: if the output now holds parts of another job.
    """
    if not plan.overwrite:
        plan.state, _, _ = plan.sink.audit(plan.splits, plan.fingerprint)
        identity = job_identity(plan.spec, plan.model, plan.task, plan.inputs, plan.keep)
        plan.identity, plan.choice = earlier(plan.ledger, identity, plan.spec, plan.state)


def split_rows(spec: JobSpec) -> int:
    """Returns the rows per split: from the spec, else the task's default."""
    return spec.input.split_rows or task_class(spec.task).split_rows


def _packages(spec: JobSpec) -> list[str]:
    """Returns the packages of the engine, or of those that `auto` may choose."""
    if spec.engine.name != "auto":
        return list(ENGINES[spec.engine.name].needs(spec.engine.quantization))
    return list(dict.fromkeys(name for kind in ENGINES.values() for name in kind.packages if find_spec(name)))


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on. :param more: those of the engine."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Makes paths absolute, since workers run in another folder and maybe on other machines."""
    return spec.model_copy(
        update={
            "input": with_absolute_paths(spec.input),
            "output": spec.output.model_copy(update={"path": absolute(spec.output.path)}),
        }
    )


def _output_faults(spec: JobSpec, ledger: Ledger, overwrite: bool, notes: list[str]) -> list[str]:
    """Checks the output; returns its faults, and adds warnings to `notes`."""
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
        return [f"output {shown} holds parts of an unknown job (no {JOB}); use --overwrite"]
    return []


def _overlap(spec: JobSpec) -> list[str]:
    """Returns a fault if the output contains the input or lies inside it."""
    source, target = spec.input.path, spec.output.path
    if reads(source, target):
        return [
            f"output.path {target} lies in the input's folder, where the next run would read it; choose a folder "
            "outside, or an input such as *.parquet that leaves it out"
        ]
    if lies_in(real_path(source), real_path(target)):
        return [f"input.path {source} lies in the output {target}; choose another output"]
    return []


def _types_kept(ledger: Ledger) -> dict[str, Any]:
    """Returns the input's column types in an earlier run, so that values have the same types in every part."""
    try:
        return (ledger.read_job() or {}).get("types", {}) if ledger.list_parts() else {}
    except (OSError, SplitError):
        return {}  # reported when the output is checked
