"""Measures the throughput of the job on one worker, for `hfbatch plan`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import ray

from hfbatch.cluster.resources import Layout, lay_out
from hfbatch.cluster.session import ceiling, connect, nodes
from hfbatch.cluster.stage_job import StageJob
from hfbatch.cluster.stages import share_of_node
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.reader import read_split
from hfbatch.data.splits import Split
from hfbatch.errors import WorkerError
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import WorkersSpec

ROWS = 512
MOST_SPLITS = 16
"""Splits that are read to find rows, since a filter may leave none in the first ones."""
TIMEOUT_S = 600


@dataclass(frozen=True)
class Trial:
    """The measurement of a worker on some rows of the job."""

    rows: int
    tokens: int
    padding: float
    """Share of the computed tokens that is padding."""
    seconds: float
    load_seconds: float
    batch_size: int
    dtype: str
    device: str
    engine: str
    quantization: str
    guard: dict[str, Any] | None
    """The comparison with float32, see `Verdict`."""
    trials: list[dict[str, Any]] | None
    """What `engine: auto` tried, see `EngineTrial`."""
    compiled: bool
    """Whether torch.compile compiled the model."""


TRIED = {field.name for field in fields(Trial)}


def run_trial(job: StageJob, todo: Sequence[Split], layout: Layout) -> Trial:
    """Runs rows of the first split with any, among the splits to process, on the resources of one worker.

    :raises WorkerError: if the model does not load or run there, no worker starts within ten minutes, or there are no
        rows.
    """
    splits = [split.to_dict() for split in todo[:MOST_SPLITS]]
    task = ray.remote(_try).options(num_cpus=layout.cpus, num_gpus=layout.gpus, max_retries=0)
    try:
        return Trial(**ray.get(task.remote(job, splits, layout.cpus), timeout=TIMEOUT_S))
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerError(f"no worker started in {TIMEOUT_S // 60} minutes; see `ray status`") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"the trial failed: {str(error).strip().splitlines()[-1]}") from error


def _try(job: StageJob, splits: list[dict[str, Any]], cpus: float) -> dict[str, Any]:
    begun = time.perf_counter()
    runner = Runner(RunnerConfig.from_json(job.runner), share_of_node(cpus))
    runner.load()
    load_seconds = time.perf_counter() - begun
    samples = (_sample(runner, Split.from_dict(split), job) for split in splits)
    features, columns = next((sample for sample in samples if len(sample[0])), (None, {}))
    if features is None:
        raise WorkerError(f"none of the first {len(splits)} splits has a usable row; see --no-trial")
    choice = runner.config.choice or runner.propose(features, job.rows, columns)
    runner.apply(choice)
    begun = time.perf_counter()
    done = runner.predict(features).stats
    seconds = time.perf_counter() - begun
    padding = 1 - done.tokens / max(done.padded_tokens, 1)
    return {
        "rows": len(features), "tokens": done.tokens, "padding": padding, "seconds": seconds,
        "load_seconds": load_seconds, **{name: value for name, value in asdict(choice).items() if name in TRIED},
    }  # fmt: skip


def _sample(runner: Runner, split: Split, job: StageJob) -> tuple[pa.Table, dict[str, pa.Array]]:
    """Returns the features of some rows of a split, empty if no row can be used, and their input columns."""
    rows = read_split(split, job.read)
    some = pa.array(range(0, len(rows.table), max(len(rows.table) // ROWS, 1)), pa.int64())
    columns = {name: array.take(some) for name, array in arrays_of(rows.table, job.inputs).items()}
    return runner.preprocess(columns, rows.places.take(some)).features, columns


def estimate(
    job: StageJob, todo: Sequence[Split], workers: WorkersSpec, address: str | None
) -> tuple[Layout, dict[str, Any]]:
    """Returns the layout on the cluster, and the trial with rates and the estimated time for all rows.

    :param todo: the splits to process.
    :raises SpecError: if the workers do not fit into the cluster.
    """
    with connect(address):
        threads = RunnerConfig.from_json(job.runner).engine.threads
        layout = lay_out(workers, nodes(), ceiling(), threads)
        trial = run_trial(job, todo, layout)
    rate = trial.rows / max(trial.seconds, 1e-9)
    rows_todo = sum(split.rows for split in todo)
    return layout, {
        **asdict(trial),
        "rows_per_s": rate,
        "tokens_per_s": trial.tokens / max(trial.seconds, 1e-9),
        "rows_todo": rows_todo,
        "eta_s": trial.load_seconds + rows_todo / max(rate * layout.workers, 1e-9),
    }
