"""A preview: the first rows of an input through all steps in this process, without Ray and without an output."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.data.reader import Rows, read_split
from hfbatch.data.splits import Split
from hfbatch.errors import SpecError
from hfbatch.output.rejects import unreadable
from hfbatch.predict.bind import Bound, bind, left_out_notes
from hfbatch.predict.plan import split_rows
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec

MOST_SPLITS = 16
"""Splits that are read to find rows: a filter may leave none in the first ones."""
GUARD_ROWS = 64
"""Rows on which a lowered precision is compared with float32."""


@dataclass
class Preview:
    """What became of a few rows."""

    spec: JobSpec
    model: str
    """Name and commit."""
    engine: str
    """Device and dtype."""
    rows: list[dict[str, Any]]
    """`file`, `row`, `input` and, of those that have a prediction, `output`."""
    rejects: list[dict[str, Any]]
    """`file`, `row`, `input`, `stage`, `error`, `message`, `traceback`."""
    seconds: dict[str, float]
    """Seconds of each step: plan, read, load, preprocess, predict, postprocess; guard if there was a comparison."""
    notes: list[str]
    guard: dict[str, Any] | None = None
    """The comparison of a lowered precision with float32, see `Verdict`; None if nothing is lowered."""


def preview(spec: JobSpec, count: int = 5) -> Preview:
    """Runs the first rows of the input.

    :param spec: of a job; its output is neither read nor written.
    :param count: rows.
    :raises SpecError: with every fault of the spec but those of its output, or where the input has no rows.
    """
    begun = time.perf_counter()
    faults: list[str] = []
    bound = bind(spec.model_copy(update={"input": with_absolute_paths(spec.input)}), None, faults)
    if faults or bound is None:
        raise SpecError(list(dict.fromkeys(faults)))
    seconds = {"plan": time.perf_counter() - begun}

    begun = time.perf_counter()
    rows = first_rows(bound, count)
    columns = arrays_of(rows.table, bound.inputs)
    seconds["read"] = time.perf_counter() - begun

    runner = Runner(RunnerConfig.of(bound.spec, bound.model, bound.source.root_url))
    begun = time.perf_counter()
    runner.load()
    seconds["load"] = time.perf_counter() - begun
    guard = _compare(bound, runner, seconds)
    done = runner.run(columns, rows.places, unreadable(rows))
    shown = _records(rows, done.positions, done.columns, list(bound.inputs.values()))
    rejects = [
        {**shown[one.position], "stage": one.stage, "error": one.error, "message": one.message,
         "traceback": one.trace(), **({"line": one.line} if one.line else {})}
        for one in done.rejects
    ]  # fmt: skip
    rejected = {one.position for one in done.rejects}
    engine = runner.engine
    return Preview(
        bound.spec,
        f"{bound.model.name} @ {bound.model.commit[:12]}",
        f"{engine.name}, {engine.device}, {engine.dtype}" if engine else "",
        [one for position, one in enumerate(shown) if position not in rejected],
        rejects,
        {**done.seconds, **seconds},
        bound.notes + bound.task.notes() + left_out_notes(bound.source),
        guard,
    )


def _compare(bound: Bound, runner: Runner, seconds: dict[str, float]) -> dict[str, Any] | None:
    """Compares a lowered precision with float32 on the first rows, as a job does on rows of a split."""
    if not runner.guarded:
        return None
    begun = time.perf_counter()
    rows = first_rows(bound, GUARD_ROWS)
    columns = arrays_of(rows.table, bound.inputs)
    features = runner.preprocess(columns, rows.places, unreadable(rows)).features
    verdict = runner.guard(features, len(rows.table), columns)
    seconds["guard"] = time.perf_counter() - begun
    return asdict(verdict) if verdict else None


def first_rows(bound: Bound, count: int) -> Rows:
    """The first rows of the first split that has any. :raises SpecError: where none of the first splits does."""
    spec = bound.spec
    limit = spec.input.limit if spec.input.filter else min(count, spec.input.limit or count)
    splits = bound.source.cut(split_rows(spec), limit)
    for rows in _read(splits[:MOST_SPLITS], bound):
        if len(rows.table):
            bad = [one for one in rows.bad if one.position < count]
            return Rows(rows.table.slice(0, count), rows.places.slice(0, count), rows.read, bad)
    reasons = [f"{split.pieces[0].file}: {split.fault}" for split in splits if split.fault][:3]
    raise SpecError(
        reasons or f"input {spec.input.path} has no rows in its first {len(splits[:MOST_SPLITS])} splits"
    )


def _read(splits: list[Split], bound: Bound) -> Iterator[Rows]:
    for split in splits:
        if split.fault is None:
            yield read_split(split, bound.read)


def _records(
    rows: Rows, positions: np.ndarray, columns: dict[str, pa.Array], inputs: list[str]
) -> list[dict[str, Any]]:
    """Each row with its place, what the task reads of it, and what it gave."""
    places = rows.places.to_pylist()
    read = rows.table.select(list(dict.fromkeys(inputs))).to_pylist()
    outputs = {
        int(position): {name: array[k].as_py() for name, array in columns.items()}
        for k, position in enumerate(positions)
    }
    return [
        {
            "file": place["file"],
            "row": place["row"],
            "input": values,
            **({"output": outputs[k]} if k in outputs else {}),
        }
        for k, (place, values) in enumerate(zip(places, read, strict=True))
    ]
