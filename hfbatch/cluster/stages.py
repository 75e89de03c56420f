"""The three stages of a split on the cluster. Each stage maps a table of one row to a table of one row.

A row is one split. Each table of the split is one binary value, so that Ray Data can neither divide nor merge
splits. No stage raises, since a UDF that raises would end the whole job: a failure is stored in the row, and the
following stages pass it on.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.util import metrics

from hfbatch.cluster.stage_job import StageJob
from hfbatch.cluster.tracker import ANSWER_S, LOAD, MAX_ATTEMPTS
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.reader import Rows, read_split
from hfbatch.data.serialization import as_column, deserialize, serialize
from hfbatch.data.splits import Split
from hfbatch.engines.base import DeviceLostError, Engine
from hfbatch.errors import SplitError, WorkerError, redact_text
from hfbatch.output.lock import TAKEOVER_S
from hfbatch.output.manifest import LENGTH_EDGES, Manifest
from hfbatch.output.rejects import (
    dump_rejects,
    first_traces,
    format_trace,
    load_rejects,
    rejects_table,
    unreadable,
)
from hfbatch.output.sink import SinkWriter
from hfbatch.output.sinks.parquet import PartWriter
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.heartbeat import beating
from hfbatch.runtime.outcome import Predicted
from hfbatch.runtime.predictor import BatchStats
from hfbatch.runtime.runner import Runner
from hfbatch.tasks.base import Task

ROW_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "manifest": pa.string(),
        "rejects": pa.string(),
        "rows": pa.large_binary(),
        "places": pa.large_binary(),
        "features": pa.large_binary(),
    }
)
"""The row between stages: texts, and tables as Arrow IPC streams. After forward, `features` holds the outputs."""
CUT = "cut"
"""The column of `places` that marks truncated rows, bool."""
Columns = Callable[[], dict[str, pa.Array]]
"""Returns the task's input columns of a split, which only the worker that makes the runtime choice needs."""
TEXTS = ("split", "manifest", "rejects")
SECONDS_BETWEEN_SIGNS = 0.5


@lru_cache(maxsize=2)
def runner_of(config: str) -> Runner:
    """Returns the job's runner, built once in each process, without its model."""
    return Runner(RunnerConfig.from_json(config))


def describe_splits(splits: Sequence[Split]) -> pa.Table:
    """Returns splits as rows for the first stage."""
    rows = [
        {"split": json.dumps(split.to_dict()), "manifest": Manifest(split.part).to_json(), "rejects": "[]"}
        for split in splits
    ]
    return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


def read_stage(row: pa.Table, job: StageJob) -> pa.Table:
    """Reads a split and turns its rows into features."""
    return _guarded("preprocess", row, job, _read)


def _read(row: dict[str, Any], manifest: Manifest, job: StageJob) -> dict[str, Any]:
    manifest.started = time.time()
    begun = time.perf_counter()
    rows = read_split(Split.from_dict(json.loads(row["split"])), job.read)
    manifest.rows_read, manifest.rows_in, manifest.unplanned = rows.read, len(rows.table), rows.unplanned
    manifest.seconds["read"] = time.perf_counter() - begun
    begun = time.perf_counter()
    runner = runner_of(job.runner)
    prepared = runner.preprocess(arrays_of(rows.table, job.inputs), rows.places, unreadable(rows))
    manifest.rows_truncated = int(prepared.cut.sum())
    if len(prepared.features):
        lengths = np.minimum(runner.task.lengths(prepared.features), LENGTH_EDGES[-1])
        manifest.lengths = np.histogram(lengths, bins=LENGTH_EDGES)[0].tolist()
    manifest.seconds["preprocess"] = time.perf_counter() - begun
    return {
        **row,
        "rejects": dump_rejects(prepared.rejects),
        "rows": serialize(rows.table),
        "places": serialize(rows.places.append_column(CUT, pa.array(prepared.cut))),
        "features": serialize(prepared.features),
    }


class ForwardStage:
    """The model worker: an actor that loads the model once.

    :param cpus: CPUs of this actor; their share of the node's CPUs decides the number of threads.
    """

    def __init__(self, job: StageJob, cpus: float) -> None:
        self._job = job
        self._unsent = BatchStats(0, 0, 0, 0.0)
        self._sent = time.monotonic()
        self._runner: Runner | None = None
        self._chosen = False
        self._fault = ""
        self._cause: Exception | None = None
        counters = ("rows", "tokens", "padded_tokens", "rejects")
        self._counters = {name: metrics.Counter(f"hfbatch_{name}", f"{name} so far") for name in counters}
        self._batch_seconds = metrics.Histogram(
            "hfbatch_batch_seconds", "seconds of a batch", boundaries=[0.001, 0.01, 0.1, 1, 10, 100]
        )
        load = LOAD, ray.get_runtime_context().get_worker_id()
        job.tracker.attempt.remote(*load)
        try:
            with beating(lambda: job.tracker.beat.remote(*load)):
                runner = Runner(RunnerConfig.from_json(job.runner), share_of_node(cpus), self._on_batch)
                runner.load()
                self._runner = runner
        except Exception as error:  # noqa: BLE001 - an actor that raises here is restarted forever
            self._fault = f"the model does not load on a worker: {type(error).__name__}: {error}"
            self._cause = error
        job.tracker.end.remote(*load)
        job.tracker.loaded.remote()

    def __call__(self, row: pa.Table) -> pa.Table:
        """Runs the model over one split."""
        return _guarded("forward", row, self._job, self._forward)

    def _forward(self, row: dict[str, Any], manifest: Manifest, job: StageJob) -> dict[str, Any]:
        if self._runner is None:
            manifest.fatal = True
            raise SplitError(self._fault) from self._cause
        runner = self._runner
        columns = partial(self._columns, row)
        row, rejected = forward(row, manifest, lambda features: self._predict(runner, features, columns))
        manifest.worker = runner.label
        self._send()
        self._count("rejects", rejected)
        return row

    def _columns(self, row: dict[str, Any]) -> dict[str, pa.Array]:
        """The task's input columns of a split."""
        return arrays_of(deserialize(row["rows"]), self._job.inputs)

    def _predict(self, runner: Runner, features: pa.Table, columns: Columns) -> Predicted:
        try:
            self._choose(runner, features, columns)
            return runner.predict(features)
        except DeviceLostError:
            os._exit(1)  # a new process gets a fresh device context; the tracker counts this attempt

    def _choose(self, runner: Runner, features: pa.Table, columns: Columns) -> None:
        """Gets the runtime choice of the job; proposes one if there is none yet."""
        if not self._chosen:
            tracker = self._job.tracker
            choice = ray.get(tracker.choice.remote(), timeout=ANSWER_S)
            if choice is None:
                tracker.propose.remote(asdict(runner.propose(features, self._job.rows, columns())))
            begun = time.monotonic()
            while choice is None:  # the driver stores the first proposal before any worker uses it
                if time.monotonic() - begun > ANSWER_S:
                    raise SplitError("the driver has not confirmed the batch size; run again")
                time.sleep(0.05)
                choice = ray.get(tracker.choice.remote(), timeout=ANSWER_S)
            runner.apply(RuntimeChoice(**choice))
            if choice["compiled"]:  # before the rate is measured
                runner.prepare(cast(Engine, runner.engine), features)
            self._chosen = True
        self._job.tracker.begin_batches.remote()

    def _on_batch(self, stats: BatchStats) -> None:
        self._batch_seconds.observe(stats.seconds)
        self._unsent.rows += stats.rows
        self._unsent.tokens += stats.tokens
        self._unsent.padded_tokens += stats.padded_tokens
        if time.monotonic() - self._sent > SECONDS_BETWEEN_SIGNS:
            self._send()

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, BatchStats(0, 0, 0, 0.0)
        self._sent = time.monotonic()
        self._job.tracker.advance.remote(unsent.rows, unsent.tokens, unsent.padded_tokens)
        for name in ("rows", "tokens", "padded_tokens"):
            self._count(name, getattr(unsent, name))

    def _count(self, name: str, by: int) -> None:
        if by:  # Ray does not accept 0
            self._counters[name].inc(by)


def forward(
    row: dict[str, Any], manifest: Manifest, predict: Callable[[pa.Table], Predicted]
) -> tuple[dict[str, Any], int]:
    """Replaces a split's features by the model's outputs. :returns: the row, and the number of rows rejected here."""
    begun = time.perf_counter()
    features = deserialize(row["features"])
    if not len(features):
        return row, 0
    made = predict(features)
    manifest.tokens, manifest.padded_tokens = made.stats.tokens, made.stats.padded_tokens
    manifest.batches, manifest.rows_repeated = made.stats.batches, made.stats.repeated
    manifest.usage = made.stats.usage
    manifest.seconds["forward"] = time.perf_counter() - begun
    rejects = dump_rejects([*load_rejects(row["rejects"]), *made.rejects])
    return {**row, "rejects": rejects, "features": serialize(made.outputs)}, len(made.rejects)


def write_stage(row: pa.Table, job: StageJob) -> pa.Table:
    """Converts outputs to columns and commits the part; returns only the manifest."""
    done = _guarded("write", row, job, _write)
    return done.select(["manifest"])


def _write(row: dict[str, Any], manifest: Manifest, job: StageJob) -> dict[str, Any]:
    begun = time.perf_counter()
    runner = runner_of(job.runner)
    split = Split.from_dict(json.loads(row["split"]))
    table, outputs = deserialize(row["rows"]), deserialize(row["features"])
    places = deserialize(row["places"])
    if len(outputs) and runner.task.fits:
        choice = ray.get(job.tracker.choice.remote(), timeout=ANSWER_S)  # final, since there are outputs
        runner.take_fitted(choice["fitted"])
    fields = [field for field in list(job.schema)[len(job.keep) :] if field.name != job.truncated]
    positions, columns, failures = runner.postprocess(outputs, arrays_of(table, job.inputs), fields)
    rejects = sorted([*load_rejects(row["rejects"]), *failures], key=lambda reject: reject.position)
    kept = table.select(list(job.keep)).take(pa.array(positions))
    flags = [places[CUT].take(pa.array(positions))] if job.truncated else []
    part = pa.table([*kept.columns, *columns, *flags], schema=job.schema)
    manifest.histogram = _histogram(runner.task, outputs, columns)
    manifest.rows_out, manifest.rows_rejected = len(part), len(rejects)
    manifest.reasons = dict(Counter(one.reason for one in rejects))
    manifest.seconds["postprocess"] = time.perf_counter() - begun
    begun = time.perf_counter()
    manifest.finished = time.time()
    rows = Rows(table, places, manifest.rows_read)
    check = partial(job.claim.check, TAKEOVER_S) if job.claim else None
    writer: SinkWriter = PartWriter(job.out, job.schema, job.rejects_schema, job.stamp, check)
    writer.commit(writer.stage(split, part, rejects_table(rows, rejects, job.rejects_schema), manifest))
    manifest.traces = first_traces(rejects)
    manifest.seconds["write"] = time.perf_counter() - begun
    return row


def _histogram(task: Task, outputs: pa.Table, columns: list[pa.Array]) -> list[int]:
    edges = task.histogram.edges
    if not len(outputs):
        return [0] * (len(edges) - 1)
    values = np.clip(task.measure(outputs, columns), edges[0], edges[-1])
    return np.histogram(values, bins=edges)[0].tolist()


def _guarded(stage: str, table: pa.Table, job: StageJob, work: Callable[..., dict[str, Any]]) -> pa.Table:
    """Runs a stage on a split unless it has failed before; fails a split that repeatedly kills its process."""
    row = {
        name: table[name][0].as_py() if name in TEXTS else table[name][0].as_buffer()
        for name in table.column_names
    }
    manifest = Manifest.from_json(row["manifest"])
    if manifest.error is None:
        tracker, rows = job.tracker, _rows_to_read(row) if stage == "preprocess" else 0
        attempt = ray.get(tracker.attempt.remote(stage, manifest.part, rows), timeout=ANSWER_S)
        try:
            if attempt > MAX_ATTEMPTS:
                raise SplitError(
                    f"its process died {MAX_ATTEMPTS} times in the {stage} stage: memory may have run out, or a library "
                    "crashed on a row; lower input.split_rows in a job of its own to find the row"
                )
            with beating(lambda: tracker.beat.remote(stage, manifest.part)):
                row = work(row, manifest, job)
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            record_failure(manifest, stage, error)
            row = {**row, "rows": None, "places": None, "features": None}
        job.tracker.end.remote(stage, manifest.part)
    row["manifest"] = manifest.to_json()
    columns = {
        name: pa.array([row[name]]) if name in TEXTS else as_column(row[name]) for name in ROW_SCHEMA.names
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def record_failure(manifest: Manifest, stage: str, error: Exception) -> None:
    """Records in the manifest why a split failed."""
    expected = isinstance(error, SplitError | WorkerError)
    cause = str(error) if expected else f"{type(error).__name__}: {error}"
    manifest.fatal = manifest.fatal or isinstance(error, WorkerError)
    if "offset overflow" in cause:
        cause = f"a column of its rows holds more than 2 GiB; lower input.split_rows ({cause})"
    manifest.error = redact_text(cause)
    manifest.traces = {f"split: {stage}: {type(error).__name__}": format_trace(error)}


def _rows_to_read(row: dict[str, Any]) -> int:
    return Split.from_dict(json.loads(row["split"])).rows


def share_of_node(cpus: float) -> float:
    """Returns this actor's share of its node's CPUs; 1 on a node for which Ray counts none."""
    here = ray.get_runtime_context().get_node_id()
    total = next((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here), 0.0)
    return min(cpus / total, 1.0) if total else 1.0
