"""The three stages of a split on the cluster. Each takes a table of one row and returns one.

A row is one split. What belongs together travels as one binary value, so that Ray Data can neither tear nor
merge splits. No stage ever raises: a UDF that raises would end the whole job, so a failure becomes part of
the row and the stages after it pass it on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util import metrics

from hfbatch.cluster.tracker import ANSWER_S, LOAD, MAX_ATTEMPTS
from hfbatch.compute.heartbeat import beating
from hfbatch.compute.predictor import BatchStats, Prediction
from hfbatch.compute.prepare import POSITION, postprocess, preprocess, reject
from hfbatch.compute.worker import Settled, Worker, WorkOrder
from hfbatch.data.manifest import LENGTH_EDGES, Manifest
from hfbatch.data.payload import as_column, pack, unpack
from hfbatch.data.reader import ReadPlan, Rows, read_split
from hfbatch.data.rejects import Reject, rejects_table
from hfbatch.data.splits import Split
from hfbatch.data.writer import PartWriter
from hfbatch.engines.base import DeviceLostError
from hfbatch.errors import SplitError
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
"""What travels between stages: texts, and tables as Arrow IPC streams; after forward, `features` holds its outputs."""
CUT = "cut"
"""The column of `places` that says which rows were cut to the length limit, bool."""
TEXTS = ("split", "manifest", "rejects")
SECONDS_BETWEEN_SIGNS = 0.5


@dataclass(frozen=True)
class StageJob:
    """What every stage needs to know of the job."""

    order: str
    """The WorkOrder as JSON."""
    read: ReadPlan
    inputs: dict[str, str]
    """Task input to column of the rows."""
    keep: tuple[str, ...]
    out: str
    schema: pa.Schema
    """Schema of the parts: the kept columns, then the task's, then `truncated` if there is one."""
    truncated: str | None
    """Name of the column that says which rows were truncated."""
    rejects_schema: pa.Schema
    stamp: dict[str, Any]
    """Goes into the parts' footers: fingerprint and model commit."""
    tracker: Any


@lru_cache(maxsize=2)
def task_of(order: str) -> Task:
    """The job's task, built once in each process."""
    return WorkOrder.from_json(order).task()


def describe_splits(splits: list[Split]) -> pa.Table:
    """Splits as rows that have been through no stage yet."""
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
    manifest.rows_read, manifest.rows_in = rows.read, len(rows.table)
    manifest.seconds["read"] = time.perf_counter() - begun
    begun = time.perf_counter()
    task = task_of(job.order)
    prepared = preprocess(task, _inputs(rows.table, job), rows.places)
    manifest.rows_truncated = int(prepared.cut.sum())
    if len(prepared.features):
        lengths = np.minimum(task.lengths(prepared.features), LENGTH_EDGES[-1])
        manifest.lengths = np.histogram(lengths, bins=LENGTH_EDGES)[0].tolist()
    manifest.seconds["preprocess"] = time.perf_counter() - begun
    return {
        **row,
        "rejects": _dump(prepared.rejects),
        "rows": pack(rows.table),
        "places": pack(rows.places.append_column(CUT, pa.array(prepared.cut))),
        "features": pack(prepared.features),
    }


class ForwardStage:
    """The model worker: an actor that loads the model once.

    :param cpus: the CPUs that Ray gives to it; its share of the node's decides its threads.
    """

    def __init__(self, job: StageJob, cpus: float) -> None:
        self._job = job
        self._unsent = BatchStats(0, 0, 0, 0.0)
        self._sent = time.monotonic()
        self._worker: Worker | None = None
        self._settled = False
        self._fault = ""
        counters = ("rows", "tokens", "padded_tokens", "rejects")
        self._counters = {name: metrics.Counter(f"hfbatch_{name}", f"{name} so far") for name in counters}
        self._batch_seconds = metrics.Histogram(
            "hfbatch_batch_seconds", "seconds of a batch", boundaries=[0.001, 0.01, 0.1, 1, 10, 100]
        )
        load = LOAD, ray.get_runtime_context().get_worker_id()
        job.tracker.attempt.remote(*load)
        try:
            with beating(lambda: job.tracker.beat.remote(*load)):
                self._worker = Worker(WorkOrder.from_json(job.order), share_of_node(cpus), self._on_batch)
        except Exception as error:  # noqa: BLE001 - an actor that raises here is started again for ever
            self._fault = f"the model does not load on a worker: {type(error).__name__}: {error}"
        job.tracker.end.remote(*load)
        job.tracker.loaded.remote()

    def __call__(self, row: pa.Table) -> pa.Table:
        """Runs the model over one split."""
        return _guarded("forward", row, self._job, self._forward)

    def _forward(self, row: dict[str, Any], manifest: Manifest, job: StageJob) -> dict[str, Any]:
        if self._worker is None:
            manifest.fatal = True
            raise SplitError(self._fault)
        begun = time.perf_counter()
        features = unpack(row["features"])
        positions = features[POSITION].to_numpy()
        features = features.drop_columns([POSITION])
        if len(features):
            prediction = self._predict(self._worker, features)
        else:
            prediction = Prediction(pa.table({}), np.empty(0, np.int64))
        self._send()
        failures = [reject(int(positions[k]), "forward", error) for k, error in prediction.failures]
        self._count("rejects", len(failures))
        outputs = prediction.outputs.append_column(POSITION, pa.array(positions[prediction.kept]))
        manifest.tokens, manifest.padded_tokens = prediction.tokens, prediction.padded_tokens
        manifest.batches, manifest.worker = prediction.batches, self._worker.label
        manifest.seconds["forward"] = time.perf_counter() - begun
        return {**row, "rejects": _dump([*_load(row["rejects"]), *failures]), "features": pack(outputs)}

    def _predict(self, worker: Worker, features: pa.Table) -> Prediction:
        try:
            self._settle(worker, features)
            return worker.predict(features)
        except DeviceLostError:
            os._exit(1)  # a new process gets a fresh device context; the tracker counts this attempt

    def _settle(self, worker: Worker, features: pa.Table) -> None:
        """Agrees with the other workers on the choices that hold for the whole job."""
        if not self._settled:
            tracker = self._job.tracker
            choice = ray.get(tracker.settled.remote(), timeout=ANSWER_S)
            if choice is None:
                tracker.propose.remote(asdict(worker.propose(features)))
            begun = time.monotonic()
            while choice is None:  # the driver writes the first proposal down before anybody uses it
                if time.monotonic() - begun > ANSWER_S:
                    raise SplitError("the driver has not confirmed the batch size; run again")
                time.sleep(0.05)
                choice = ray.get(tracker.settled.remote(), timeout=ANSWER_S)
            worker.settle(Settled(**choice))
            self._settled = True
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
        if by:  # Ray refuses to add nothing
            self._counters[name].inc(by)


def write_stage(row: pa.Table, job: StageJob) -> pa.Table:
    """Turns outputs into columns and commits the part; what is left of the row is its manifest."""
    done = _guarded("write", row, job, _write)
    return done.select(["manifest"])


def _write(row: dict[str, Any], manifest: Manifest, job: StageJob) -> dict[str, Any]:
    begun = time.perf_counter()
    task = task_of(job.order)
    split = Split.from_dict(json.loads(row["split"]))
    table, outputs = unpack(row["rows"]), unpack(row["features"])
    places = unpack(row["places"])
    fields = [field for field in list(job.schema)[len(job.keep) :] if field.name != job.truncated]
    positions, columns, failures = postprocess(task, fields, outputs, _inputs(table, job))
    rejects = sorted([*_load(row["rejects"]), *failures], key=lambda reject: reject.position)
    kept = table.select(list(job.keep)).take(pa.array(positions))
    flags = [places[CUT].take(pa.array(positions))] if job.truncated else []
    part = pa.table([*kept.columns, *columns, *flags], schema=job.schema)
    manifest.histogram = _histogram(task, outputs, columns)
    manifest.rows_out, manifest.rows_rejected = len(part), len(rejects)
    for one in rejects:
        reason = f"{one.stage}: {one.error}"
        manifest.reasons[reason] = manifest.reasons.get(reason, 0) + 1
    manifest.seconds["postprocess"] = time.perf_counter() - begun
    begun = time.perf_counter()
    manifest.finished = time.time()
    rows = Rows(table, places, manifest.rows_read)
    writer = PartWriter(job.out, job.schema, job.rejects_schema, job.stamp)
    writer.write(split, part, rejects_table(rows, rejects, job.rejects_schema), manifest)
    manifest.seconds["write"] = time.perf_counter() - begun
    return row


def _histogram(task: Task, outputs: pa.Table, columns: list[pa.Array]) -> list[int]:
    edges = task.histogram.edges
    if not len(outputs):
        return [0] * (len(edges) - 1)
    values = np.clip(task.measure(outputs, columns), edges[0], edges[-1])
    return np.histogram(values, bins=edges)[0].tolist()


def _guarded(stage: str, table: pa.Table, job: StageJob, work: Callable[..., dict[str, Any]]) -> pa.Table:
    """Runs a stage on a split that has not failed before; gives up a split that keeps killing its process."""
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
                raise SplitError(f"its rows killed the process of the {stage} stage {MAX_ATTEMPTS} times")
            with beating(lambda: tracker.beat.remote(stage, manifest.part)):
                row = work(row, manifest, job)
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            cause = str(error) if isinstance(error, SplitError) else f"{type(error).__name__}: {error}"
            if "offset overflow" in cause:
                cause = f"a column of its rows holds more than 2 GiB; lower input.split_rows ({cause})"
            manifest.error = cause
            row = {**row, "rows": None, "places": None, "features": None}
        job.tracker.end.remote(stage, manifest.part)
    row["manifest"] = manifest.to_json()
    columns = {
        name: pa.array([row[name]]) if name in TEXTS else as_column(row[name]) for name in ROW_SCHEMA.names
    }
    return pa.table(columns, schema=ROW_SCHEMA)


def _rows_to_read(row: dict[str, Any]) -> int:
    return Split.from_dict(json.loads(row["split"])).rows


def _inputs(table: pa.Table, job: StageJob) -> dict[str, pa.Array]:
    columns = {name: table[column].combine_chunks() for name, column in job.inputs.items()}
    return {
        name: pa.concat_arrays(c.chunks) if isinstance(c, pa.ChunkedArray) else c
        for name, c in columns.items()
    }


def _dump(rejects: list[Reject]) -> str:
    return json.dumps([asdict(reject) for reject in rejects])


def _load(text: str) -> list[Reject]:
    return [Reject(**values) for values in json.loads(text)]


def share_of_node(cpus: float) -> float:
    """This actor's part of its node's CPUs; on a node where Ray counts none, all of them."""
    here = ray.get_runtime_context().get_node_id()
    total = next((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here), 0.0)
    return min(cpus / total, 1.0) if total else 1.0
