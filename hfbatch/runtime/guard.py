"""The guard: compares a model in lowered precision with the same model in float32, on rows of the job. Does not import Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import BatchEngine, Engine
from hfbatch.runtime.batching import by_length
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.prepare import POSITION, postprocess
from hfbatch.runtime.variants import Variant, no_reference
from hfbatch.spec.engines import GuardSpec
from hfbatch.tasks.agreement import Agreement, ColumnAgreement, Comparison, Limit
from hfbatch.tasks.base import Task

FIRST_ROWS = 8
"""Rows that are compared in any case, and from whose time the number of the others follows."""
BATCH = 16
LEAST_SECONDS, MOST_SECONDS, MOST_SHARE = 1.0, 30.0, 0.05
"""Limits of the time of a comparison: between the first two, a share of the job's estimated time."""
EDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Edges of the differences that the report counts."""


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison, in plain values."""

    precision: str
    """What was compared with float32, such as `int8 by openvino`."""
    status: str
    """passed, failed or unguarded: nothing was compared, or no measure has a limit."""
    reason: str = ""
    """Which limits do not hold, or why there was no comparison."""
    rows: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)
    """The limits in words, such as `at least 0.98`."""
    differences: list[int] = field(default_factory=list)
    """Rows by 1 less their agreement, with the edges EDGES."""
    row: str = ""
    """What the agreement of a row is."""
    seconds: float = 0.0

    edges: tuple[float, ...] = EDGES
    summary: str = field(init=False)
    """All of it in a sentence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "summary", self._summary())

    def _summary(self) -> str:
        if self.status == "unguarded" and not self.measures:
            return f"{self.precision} was not compared with float32: {self.reason}"
        shown = ", ".join(f"{name} {value:.5g}" for name, value in self.measures.items()) or self.reason
        if self.status == "unguarded":
            return (
                f"{self.precision} was compared with float32 on {self.rows:,} rows, and nothing is judged unless "
                f"engine.guard.limits sets a limit: {shown}"
            )
        if self.status == "passed":
            return f"{self.precision} agrees with float32 on {self.rows:,} rows: {shown}"
        broken = f"; {self.reason}" if self.measures else ""
        return f"{self.precision} differs too much from float32 on {self.rows:,} rows: {shown}{broken}"


def advice(variant: Variant, status: str = "failed") -> str:
    """Returns what to set instead of a variant that differs too much, or that `guard: required` refuses as unguarded."""
    instead = "engine.quantization=none" if variant.quantization != "none" else "model.dtype=float32"
    if status == "unguarded":
        return f"Set {instead}, or leave guard: required out"
    return f"Set {instead}; or other engine.guard.limits, if these differences do no harm"


def limit_faults(task: Task, spec: GuardSpec) -> list[str]:
    """Returns errors for limits of measures that the task does not have."""
    known = task.agreement.limits if task.agreement else {}
    return [
        f"engine.guard.limits: task {task.name} has no measure {name!r} (it has: {', '.join(known) or 'none'})"
        for name in spec.limits
        if name not in known
    ]


def is_limited(task: Task) -> bool:
    """Returns whether a measure of the task has a limit that the spec need not set."""
    limits = task.agreement.limits.values() if task.agreement else ()
    return any(limit.value is not None for limit in limits)


def compare(
    task: Task,
    reference: Callable[[], Engine],
    engine: Engine,
    precision: str,
    features: pa.Table,
    columns: Mapping[str, pa.Array],
    spec: GuardSpec,
    rows: int,
) -> Verdict:
    """Runs some rows on both engines, if the model has a float32 reference.

    :param reference: loads the model in float32.
    :param features: rows of a split, with the column POSITION.
    :param columns: the task's input columns of the whole split.
    :param rows: rows of the job.
    """
    reason = no_reference(task)
    if engine.model is None:
        reason = reason or f"engine {engine.name} does not give the probabilities of texts that others wrote"
    if reason:
        return Verdict(precision, "unguarded", reason)
    exact, begun = reference(), time.perf_counter()
    chosen = sample(task.lengths(features), spec.rows, task.seed)
    count = FIRST_ROWS
    for _ in range(2):  # the first time warms both up, and shows how many rows there is time for
        some, started = features.take(pa.array(chosen[:count])), time.perf_counter()
        found = _agreement(task, exact, engine, some, columns)
        each = (time.perf_counter() - started) / len(some)
        limit = min(max(MOST_SHARE * each * rows / 2, LEAST_SECONDS), MOST_SECONDS)
        if limit / each <= count:
            break
        count = int(limit / each)
    return verdict(task, found, precision, len(some), spec, time.perf_counter() - begun)


def verdict(
    task: Task, found: Comparison | str | None, precision: str, rows: int, spec: GuardSpec, seconds: float
) -> Verdict:
    """Judges a comparison by the task's limits and those of the spec. :param found: see `_agreement`."""
    if found is None:
        reason = f"none of {rows:,} rows has a result in float32"
        return Verdict(precision, "unguarded", reason, rows, seconds=seconds)
    if isinstance(found, str):
        return Verdict(precision, "failed", found, rows, seconds=seconds)
    if found.lacking:
        reason = f"none of {rows:,} rows has {found.lacking}, in either precision"
        return Verdict(precision, "unguarded", reason, rows, seconds=seconds)
    agreement = agreement_of(task)
    limits = {
        name: Limit(spec.limits.get(name, limit.value), limit.most)
        for name, limit in agreement.limits.items()
    }
    broken = [
        f"{name} must be {limits[name]}"
        for name, value in found.measures.items()
        if not limits[name].holds(value)
    ]
    broken += [
        f"{name} must be {limits[name]}, and was not measured on {rows:,} rows"
        for name in spec.limits
        if name not in found.measures
    ]
    counts = np.histogram(1 - np.clip(found.rows, 0, 1), bins=EDGES)[0].tolist()
    shown = {name: str(limit) for name, limit in limits.items() if limit.value is not None}
    status = (
        "failed" if broken else "passed" if any(name in shown for name in found.measures) else "unguarded"
    )
    return Verdict(
        precision, status, "; ".join(broken), rows, found.measures, shown, counts,
        agreement.row, seconds,
    )  # fmt: skip


def agreement_of(task: Task) -> Agreement:
    """Returns the task's measure. :raises ValueError: if it has none, see `variants.no_reference`."""
    agreement = task.own_agreement
    if agreement is None:
        raise ValueError(f"task {task.name} has no measure of agreement")
    return agreement


def sample(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns rows that are spread over the lengths, in an order of which each beginning is spread too.

    :param lengths: int64 [rows].
    """
    random = np.random.default_rng(seed)
    order = by_length(lengths)
    strata = np.array_split(order, min(count, len(order)))
    return random.permutation([random.choice(rows) for rows in strata])


def _agreement(
    task: Task, reference: Engine, engine: Engine, features: pa.Table, columns: Mapping[str, pa.Array]
) -> Comparison | str | None:
    """Compares the models on rows; returns a sentence where the engine fails on rows that the reference can compute, and
    None where that can compute none.
    """
    task = task.compared
    compared = task.compare_models(reference.model, engine.model, features.drop_columns([POSITION]))
    if compared is not None:
        return compared
    one, other = (_answers(task, each, features, columns) for each in (reference, engine))
    lost = np.setdiff1d(one.rows, other.rows)
    if len(lost):
        cause = other.failures[int(lost[0])]
        return f"{len(lost)} of {len(features)} rows fail, which do not in float32: {cause}"
    if not len(one.rows):
        return None
    both = pa.array(np.isin(other.rows, one.rows))
    found = {name: array.filter(both) for name, array in other.columns.items()}
    return cast(ColumnAgreement, agreement_of(task)).compare(one.columns, found)


@dataclass(frozen=True)
class _Answers:
    """What a model gives for rows."""

    rows: np.ndarray
    """Positions of the rows that have a result, in the order of the features."""
    columns: dict[str, pa.Array]
    failures: dict[int, str]
    """Why the others have none, by position."""


def _answers(task: Task, engine: Engine, features: pa.Table, columns: Mapping[str, pa.Array]) -> _Answers:
    positions = features[POSITION].to_numpy()
    made = Predictor(task, cast(BatchEngine, engine), BATCH).predict(features.drop_columns([POSITION]))
    outputs = made.outputs.append_column(POSITION, pa.array(positions[made.kept]))
    fields = task.fields_for(set(columns))
    rows, arrays, rejects = postprocess(task, fields, outputs, columns)
    failures = {int(positions[row]): str(error) for row, error in made.failures}
    failures |= {reject.position: reject.message for reject in rejects}
    return _Answers(rows, {field.name: array for field, array in zip(fields, arrays, strict=True)}, failures)
