"""What tests of whole trainings share: rows, specs, comparing models; and training in this process, without Ray."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

import hfbatch
from hfbatch.runtime.machine import Node
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train import worker_group
from hfbatch.train.data.rows import FeatureRows
from hfbatch.train.features import make_features
from hfbatch.train.loop.worker_config import TrainWorkerConfig, build_recipe, state_folder
from hfbatch.train.plan import make_finetune_plan
from hfbatch.train.run import FinetuneResult, finetune
from hfbatch.train.worker_group import WorkerGroup
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, processes_of, read_output
from tests.models.text import CORPUS
from tests.programs import forkserver

TRAIN_ROWS = 120
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Without dropout nothing is random but the order of rows."""


def write_rows(folder: Path, held_out: int = 101) -> Path:
    """TRAIN_ROWS sentences to learn from, and others to measure with, with `label` yes where they hold "not"."""
    random = np.random.default_rng(0)
    for part, rows in (("train", TRAIN_ROWS), ("dev", held_out)):
        texts = [CORPUS[place] for place in random.integers(0, len(CORPUS), rows)]
        labels = ["yes" if "not" in text else "no" for text in texts]
        (folder / part).mkdir()
        pq.write_table(
            pa.table({"text": texts, "label": labels}), folder / part / "rows.parquet", row_group_size=50
        )
    return folder


def spec_of(data: Path, model: str, out: Path, **changes: Any) -> FinetuneSpec:
    """A small training with one process."""
    values: dict[str, Any] = {
        "task": "text-classification",
        "model": {"name": model, "overrides": STILL},
        "train": str(data / "train"),
        "eval": str(data / "dev"),
        "output": str(out),
        "schedule": {"epochs": 3, "learning_rate": 5e-3},
        "batch": {"size": 16},
        "compute": {"dtype": "float32"},
        "workers": {"count": 1, "cpus": 1},
    }
    return FinetuneSpec.build({**values, **changes})


def worker_config_of(spec: FinetuneSpec) -> TrainWorkerConfig:
    """What training processes are told, the features written: as `finetune` does it, without Ray."""
    plan = make_finetune_plan(spec)
    recipe, features = plan.recipe, Path(state_folder(plan.spec)) / "features-here"
    for name, given in (("train", spec.train), ("eval", spec.eval)):
        table = ds.dataset(given.path).to_table()  # type: ignore[union-attr]
        columns = {column: table[column].combine_chunks() for column in table.column_names}
        places = pa.table({"file": ["rows.parquet"] * len(table), "row": range(len(table))})
        if name == "train":
            statistics = recipe.validate(columns, places)
            recipe = build_recipe(plan.spec, plan.model, recipe.fit(statistics, plan.types))
            assert recipe.train_faults(statistics, plan.types) == []
        made, _ = make_features(recipe, columns, places)
        (features / name).mkdir(parents=True)
        pq.write_table(made, features / name / "part-000000.parquet")
    return TrainWorkerConfig(plan.spec, plan.model, recipe.fitted, str(features))


def predicted(
    task: str,
    model: str,
    rows: Path,
    out: Path,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    **params: Any,
) -> pa.Table:
    """What `hfbatch predict` makes of rows, without Ray, in float32 and in their order, with a model that was trained."""
    job = {
        "task": task,
        "model": {"name": model, "dtype": "float32"},
        "input": {"path": str(rows), "columns": columns or {}},
        "output": {"path": str(out), "keep": list(keep)},
        "workers": {"count": 1},
        "params": params,
    }
    assert job_here(hfbatch.JobSpec.build(job)).exit_code == 0
    return ds.dataset(sorted(map(str, out.glob("*.parquet")))).to_table()


def finetune_here(spec: FinetuneSpec) -> FinetuneResult:
    """A whole fine-tuning without Ray, in this process, or in two that it starts to train: for what is learnt, whoever
    starts them. test_finetune.py and test_kills.py do it with Ray.
    """

    def fit(
        order: TrainWorkerConfig,
        team: WorkerGroup,
        on_news: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> dict[str, Any]:
        if team.workers == 1:
            return run_here(order, Path(folder))[0]
        run_both(order, Path(folder) / "both")
        return json.loads((Path(folder) / "both" / "news-0.json").read_text())

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(worker_group, "fit", fit)
        patch.setattr("hfbatch.cluster.session.connect", lambda address: nullcontext())
        patch.setattr("hfbatch.cluster.session.nodes", lambda: [Node(4, 0)])
        patch.setattr("hfbatch.cluster.session.ceiling", lambda: None)
        patch.setattr(
            "hfbatch.train.features.over_splits",
            lambda splits, work: list(map(work, range(len(splits)), splits)),
        )
        return finetune(spec, quiet=True)


def train_and_predict(
    task: str, model: Mapping[str, Any], folder: Path, rows: pa.Table, held_out: pa.Table, **options: Any
) -> tuple[dict[str, Any], pa.Table]:
    """Fine-tunes a model in this process and has it predict.

    :param rows: to learn from, with `label`.
    :param held_out: to measure with and to predict.
    :param options: further parts of the spec of the training.
    :returns: metrics of the training, and predictions in order of the rows.
    """
    sources = {}
    for part, table in (("train", rows), ("eval", held_out)):
        (folder / part).mkdir()
        table = table.append_column("id", pa.array(range(len(table))))
        pq.write_table(table, folder / part / "rows.parquet")
        sources[part] = {"path": str(folder / part), "split_rows": len(table)}
    workers, trained = {"count": 1, "cpus": 1}, str(folder / "trained")
    spec = {"task": task, "model": model, **sources, "output": trained, "workers": workers, **options}
    result = finetune_here(FinetuneSpec.build({"compute": {"dtype": "float32"}, **spec}))
    job = make_spec(task, result.model, folder / "eval", folder / "out", output={"keep": ["id"]})
    assert job_here(job).exit_code == 0
    return result.metrics, read_output(folder / "out")


class Stopped(Exception):
    """In place of what ends a training early."""


def run_here(
    order: TrainWorkerConfig, folder: Path, stop: int | None = None, **options: Any
) -> tuple[dict[str, Any], Counter[int]]:
    """Trains in this process. :returns: the last news, and how often each training row was in a batch.

    :param folder: for what each run has on this machine.
    :param stop: after which step it ends early. :raises Stopped: then.
    """
    return run_rank(0, 1, order.to_json(), str(folder), stop, **options)


def run_both(order: TrainWorkerConfig, folder: Path, stop: int | None = None) -> Counter[int]:
    """Trains in two processes. :returns: how often each training row was in a batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    args = (2, order.to_json(), str(folder), stop, port)
    forkserver()  # torch starts processes from it
    torch.multiprocessing.start_processes(run_rank, args, nprocs=2, start_method="forkserver")  # type: ignore[attr-defined]
    taken: Counter[int] = Counter()
    for rank in range(2):
        taken.update(json.loads((folder / f"taken-{rank}.json").read_text()))
    return taken


def run_rank(
    rank: int, world: int, order: str, folder: str, stop: int | None, port: int = 0, **options: Any
) -> tuple[dict[str, Any], Counter[int]]:
    """One training process of `world`, with the threads of a job's with one CPU: bits differ with their number."""
    from hfbatch.train.loop.loop import train

    torch.set_num_threads(1)
    if TrainWorkerConfig.from_json(order).spec.workers.strategy == "fsdp":
        share_among_cpus()
    news: list[dict[str, Any]] = []
    taken: list[int] = []

    def tell(piece: dict[str, Any]) -> None:
        news.append(piece)
        if stop is not None and piece.get("step", 0) > stop:
            raise Stopped

    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        dist.init_process_group("gloo")
    with rows_noted(taken), tempfile.TemporaryDirectory() as local:
        train(TrainWorkerConfig.from_json(order), Path(local), rank, world, tell, **options)
    if world > 1:
        (Path(folder) / f"taken-{rank}.json").write_text(json.dumps(taken))
        (Path(folder) / f"news-{rank}.json").write_text(json.dumps(news[-1] if news else {}))
        dist.destroy_process_group()
    return news[-1] if news else {}, Counter(taken)


def share_among_cpus() -> None:
    """Lets this process and those beside it share a model (FSDP2): Accelerate does so for accelerators alone, torch
    for CPUs too."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begun(state: PartialState, *args: Any, **options: Any) -> None:
        begin(state, *args, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_HPU

    PartialState.__init__ = begun  # type: ignore[method-assign]


@contextmanager
def rows_noted(taken: list[int]) -> Iterator[None]:
    """Within it, the numbers of training rows that batches are made of are noted."""
    take = FeatureRows.take

    def noted(rows: FeatureRows, numbers: list[int]) -> pa.Table:
        taken.extend(numbers if len(rows) == TRAIN_ROWS else [])
        return take(rows, numbers)

    FeatureRows.take = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        FeatureRows.take = take  # type: ignore[method-assign]


@contextmanager
def killed_after_checkpoint(out: Path) -> Iterator[None]:
    """Within it, a training process of a cluster of this one is killed with SIGKILL once the first checkpoint is there."""
    over, killed = threading.Event(), []

    def kill() -> None:
        while not killed and not over.wait(0.05):
            if list(out.glob("__hfbatch/checkpoints/*/MANIFEST.json")):
                for process in processes_of(os.getpid(), "RayTrainWorker")[:1]:
                    process.kill()
                    killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        assert killed


def assert_same_weights(one: str, other: str) -> None:
    mine, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)
