"""A short trial on a real worker, for `hfbatch plan`: how fast the job will be."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from hfbatch.cluster.resources import Layout, lay_out
from hfbatch.cluster.session import ceiling, connect, nodes
from hfbatch.cluster.stages import share_of_node
from hfbatch.compute.prepare import POSITION, preprocess
from hfbatch.compute.worker import Worker, WorkOrder
from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.splits import Split
from hfbatch.errors import WorkerError
from hfbatch.plan import Plan
from hfbatch.tasks.base import Task

ROWS = 512
MOST_SPLITS = 16
"""Splits that are read to find rows: a filter may leave none in the first ones."""
TIMEOUT_S = 600


@dataclass(frozen=True)
class Trial:
    """What a worker did with some rows of the job."""

    rows: int
    tokens: int
    padding: float
    """Share of the computed tokens that is padding."""
    seconds: float
    load_seconds: float
    batch_size: int
    dtype: str
    device: str


def probe(plan: Plan, layout: Layout) -> Trial:
    """Runs rows of the first split that has any, of those that are to do, on one worker's resources.

    :raises WorkerError: if the model does not load or run there, no worker comes up in ten minutes, or there are no
        rows to try.
    """
    splits = [split.to_dict() for split in plan.todo[:MOST_SPLITS]]
    job = (plan.order.to_json(), plan.read, plan.inputs, splits, layout.cpus)
    task = ray.remote(_try).options(num_cpus=layout.cpus, num_gpus=layout.gpus, max_retries=0)
    try:
        return Trial(**ray.get(task.remote(*job), timeout=TIMEOUT_S))
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerError(f"no worker came up in {TIMEOUT_S // 60} minutes; see `ray status`") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"the trial failed: {str(error).strip().splitlines()[-1]}") from error


def _try(
    order: str, read: ReadPlan, inputs: dict[str, str], splits: list[dict[str, Any]], cpus: float
) -> dict[str, Any]:
    begun = time.perf_counter()
    worker = Worker(WorkOrder.from_json(order), share_of_node(cpus))
    load_seconds = time.perf_counter() - begun
    samples = (_sample(worker.task, Split.from_dict(split), read, inputs) for split in splits)
    features = next((sample for sample in samples if len(sample)), None)
    if features is None:
        raise WorkerError(
            f"none of the first {len(splits)} splits has a row that can be tried; see --no-trial"
        )
    settled = worker.order.settled or worker.propose(features)
    worker.settle(replace(settled, dtype=worker.engine.dtype))
    begun = time.perf_counter()
    done = worker.predict(features)
    seconds = time.perf_counter() - begun
    padding = 1 - done.tokens / max(done.padded_tokens, 1)
    shown = {
        name: value for name, value in asdict(settled).items() if name in ("batch_size", "dtype", "device")
    }
    return {
        "rows": len(features), "tokens": done.tokens, "padding": padding, "seconds": seconds,
        "load_seconds": load_seconds, **shown,
    }  # fmt: skip


def _sample(task: Task, split: Split, read: ReadPlan, inputs: dict[str, str]) -> pa.Table:
    """Features of some rows of a split, those of no row where none can be used."""
    rows = read_split(split, read)
    some = pa.array(range(0, len(rows.table), max(len(rows.table) // ROWS, 1)), pa.int64())
    columns = {name: rows.table[column].take(some).combine_chunks() for name, column in inputs.items()}
    return preprocess(task, columns, rows.places.take(some)).features.drop_columns([POSITION])


def foretell(plan: Plan, address: str | None) -> tuple[Layout, dict[str, Any]]:
    """Who gets what on the cluster, and the trial with rates and the time that all rows will take.

    :raises SpecError: if the workers do not fit into the cluster.
    """
    with connect(address):
        layout = lay_out(plan.spec.workers, nodes(), ceiling())
        trial = probe(plan, layout)
    rate = trial.rows / max(trial.seconds, 1e-9)
    rows_todo = sum(split.rows for split in plan.todo)
    return layout, {
        **asdict(trial),
        "rows_per_s": rate,
        "tokens_per_s": trial.tokens / max(trial.seconds, 1e-9),
        "rows_todo": rows_todo,
        "eta_s": trial.load_seconds + rows_todo / max(rate * layout.workers, 1e-9),
    }
