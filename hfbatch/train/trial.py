"""Runs a few real steps on a worker for `hfbatch plan`, to measure speed and memory of a training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from hfbatch.data.temporary import own_folder
from hfbatch.errors import WorkerError
from hfbatch.output.writer import part_table_bytes
from hfbatch.train.data.rows import FeatureRows
from hfbatch.train.features import Part, make_features, read_rows, recipe_of
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from hfbatch.train.recipes.base import Recipe
from hfbatch.train.worker_group import WorkerGroup

if TYPE_CHECKING:
    import torch

ROWS = 512
"""Number of sampled rows, for lengths and for the trial."""
STEPS = 3
"""Number of timed steps, after one warm-up step."""
TIMEOUT_S = 600


def try_steps(config: TrainWorkerConfig, part: Part, team: WorkerGroup) -> dict[str, Any]:
    """Runs a trial on a worker with rows of the first split.

    :returns: `seconds_per_step`, `rows_per_s` and `tokens_per_s` of one process, `eval_rows_per_s`, `load_seconds`,
        `steps` timed, `activations` (bytes, for copies of the longest sampled row), `trainable`, `weights`,
        `device`, `dtype`.
    :raises WorkerError: if the model cannot be trained there, or no worker starts within ten minutes.
    """
    task = ray.remote(_try).options(num_cpus=team.cpus, num_gpus=team.gpus, max_retries=0)
    try:
        return ray.get(task.remote(config.to_json(), part, team.workers, team.cpus), timeout=TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise WorkerError(f"no worker started within {TIMEOUT_S // 60} minutes; see `ray status`") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"the trial failed: {str(error).strip().splitlines()[-1]}") from error


def _try(config_json: str, part: Part, world: int, cpus: float) -> dict[str, Any]:
    import torch

    torch.set_num_threads(max(int(cpus), 1))
    with own_folder("trial-") as local:
        return _Trial(TrainWorkerConfig.from_json(config_json), part, world, local).figures()


def sample(recipe: Recipe, part: Part, local: Path) -> tuple[FeatureRows, int, int]:
    """Returns features of evenly spaced rows of the first non-empty split, the number of rows, and of truncated ones.

    :param recipe: with access to the files that rows of the part may name.
    :param local: an empty folder on this machine.
    """
    for split in part.splits:
        columns, places = read_rows(split, part)
        if len(places):
            break
    some = pa.array(np.unique(np.linspace(0, len(places) - 1, min(ROWS, len(places))).astype(int)))
    columns = {name: column.take(some) for name, column in columns.items()}
    table, truncated = make_features(recipe, columns, places.take(some))
    (local / "features").mkdir()
    (local / "features" / "part-000000.parquet").write_bytes(part_table_bytes(table))
    return FeatureRows(str(local / "features"), local), len(some), truncated


class _Trial:
    """The part of one process in a training step, with sampled rows."""

    def __init__(self, config: TrainWorkerConfig, part: Part, world: int, local: Path) -> None:
        import torch

        from hfbatch.train.loop.accelerate_loop import optimizer_of
        from hfbatch.train.loop.arguments import arguments
        from hfbatch.train.loop.model import build_model
        from hfbatch.train.loop.training import collator

        begun = time.perf_counter()
        self.config = config
        self.recipe = recipe_of(config.spec, config.model, part, config.fitted)
        self.args = arguments(config, local, world)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows, _, _ = sample(self.recipe, part, local)
        self.model = build_model(config.spec, self.recipe).to(self.device)
        if config.spec.compute.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.collate = collator(self.recipe, self.model)(self.rows)
        self.optimizer = optimizer_of(self.model, self.args)
        self.load_seconds = time.perf_counter() - begun

    @property
    def dtype(self) -> str:
        """Precision of the forward pass."""
        return "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"

    def figures(self) -> dict[str, Any]:
        """Returns the results of `try_steps`."""
        from hfbatch.train.loop.memory import kept_for_backward
        from hfbatch.train.loop.model import trainable

        activations = kept_for_backward(self.model, lambda: self.loss(self.longest()))
        each, tokens, steps = self.time_steps()
        changed, weights = trainable(self.model)
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return {
            "seconds_per_step": each,
            "rows_per_s": rows / each,
            "tokens_per_s": tokens / each,
            "eval_rows_per_s": self.time_evaluation(),
            "load_seconds": self.load_seconds,
            "steps": steps,
            "activations": activations,
            "trainable": changed,
            "weights": weights,
            "device": self.device.type,
            "dtype": self.dtype,
        }

    def longest(self) -> dict[str, torch.Tensor]:
        """Returns a batch with copies of the longest row."""
        return self.batch([int(self.rows.lengths.argmax())] * self.args.per_device_train_batch_size)

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Returns a batch of rows on the device."""
        return {name: value.to(self.device) for name, value in self.collate(numbers).items()}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes the loss of a batch as the training does."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.precision():
            outputs = self.model(**inputs)
        return self.recipe.loss(outputs, batch["labels"], 1)

    def precision(self) -> torch.autocast:
        """Returns a context in which the model computes in `dtype`."""
        import torch

        return torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    def time_steps(self) -> tuple[float, float, int]:
        """Returns seconds and tokens of an average step of this process, and the number of timed steps.

        Since steps differ in length, the time is measured per computed token, including padding.
        """
        from hfbatch.train.loop.sampler import NO_ROW, ShuffledRows

        part, parts = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        batch, lengths = self.config.spec.batch, self.rows.lengths
        order = np.array(list(ShuffledRows(lengths, part * parts, self.args.seed, batch.by_length)))
        steps = order.reshape(-1, parts, part)
        computed = lengths[np.maximum(steps, 0)].max(axis=2).sum(axis=1) * part
        real = np.where(steps == NO_ROW, 0, lengths[steps]).sum(axis=(1, 2))
        timed = [number % len(steps) for number in range(STEPS + 1)]
        seconds = [self.step(steps[number].tolist()) for number in timed]
        pace = sum(seconds[1:]) / computed[timed[1:]].sum()
        return float(pace * computed.mean()), float(real.mean()), STEPS

    def step(self, batches: list[list[int]]) -> float:
        """Runs one optimizer step; returns its seconds."""
        begun = time.perf_counter()
        for numbers in batches:
            self.loss(self.batch(numbers)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - begun

    def time_evaluation(self) -> float:
        """Returns the rows per second of evaluation."""
        import torch

        size = min(self.args.per_device_train_batch_size * 2, len(self.rows))
        numbers = np.linspace(0, len(self.rows) - 1, size).astype(int).tolist()
        begun = time.perf_counter()
        with torch.no_grad(), self.precision():
            self.recipe.predict(self.model.eval(), self.batch(numbers))
        self.wait()
        return size / (time.perf_counter() - begun)

    def wait(self) -> None:
        """Waits until the device has finished its work."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
