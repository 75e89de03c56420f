"""State of a training process that both loops share: model, rows, checkpoints, evaluation."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from hfbatch.data.filesystem import join, one_line, redact
from hfbatch.errors import WorkerError
from hfbatch.train.data.rows import FeatureRows
from hfbatch.train.loop.arguments import arguments
from hfbatch.train.loop.callbacks import EpochOrder, MeasuredFirst, News, Report, SaveBeforeLeaving
from hfbatch.train.loop.checkpoints import Checkpoints
from hfbatch.train.loop.evaluate import NO_NUMBERS, Collate, evaluate
from hfbatch.train.loop.fsdp import layers_to_share
from hfbatch.train.loop.model import build_model
from hfbatch.train.loop.per_example import DETAILS
from hfbatch.train.loop.sampler import NO_ROW, ShuffledRows
from hfbatch.train.loop.throughput import StepClock
from hfbatch.train.loop.trackers import reporters
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from hfbatch.train.recipes.base import IGNORED, Recipe


@dataclass
class Training:
    """One process of a training, one of `world`.

    :param local: an empty folder on this machine.
    :param report: sends news to the driver; only the first process calls it.
    :param leaving: whether a machine is about to be removed; all processes call it together and get the same answer.
    """

    config: TrainWorkerConfig
    local: Path
    rank: int
    world: int
    report: Report
    leaving: Callable[[], bool] | None = None
    model: Any = field(init=False)
    rows: dict[str, FeatureRows] = field(init=False)
    args: TrainingArguments = field(init=False)

    def __post_init__(self) -> None:
        features = self.config.features
        self.rows = {name: FeatureRows(join(features, name), self.local / name) for name in ("train", "eval")}
        self.model = build_model(self.config.spec, self.config.recipe)
        self.args = arguments(self.config, self.local, self.world, layers_to_share(self.model))
        self.checkpoints = Checkpoints(join(self.config.state, "checkpoints"))
        batch = self.config.spec.batch
        self.sampler = ShuffledRows(
            self.rows["train"].lengths, batch.size, self.config.spec.seed, batch.by_length
        )
        self.clock = StepClock()

    @cached_property
    def collate(self) -> dict[str, Collate]:
        """Collate functions for `train` and `eval`."""
        of = collator(self.config.recipe, self.model)
        return {name: of(rows) for name, rows in self.rows.items()}

    def callbacks(self, measure: Callable[[], object]) -> list[TrainerCallback]:
        """Returns the callbacks of the loop. :param measure: evaluates the current model and logs the metrics."""
        patience = self.config.spec.evaluation.patience
        found = [EarlyStoppingCallback(patience)] if patience else []
        found += [self.clock, *(reporters(self.config.spec, self.local) if self.rank == 0 else [])]
        found += [MeasuredFirst(measure), EpochOrder(self.sampler)]
        found += [News(self.report)] if self.rank == 0 else []
        return found + ([SaveBeforeLeaving(self.leaving)] if self.leaving else [])

    def evaluate(self, model: Any) -> dict[str, float]:
        """Computes metrics of the evaluation set, prefixed by `eval_`; keeps per-row details for `save`.

        :raises WorkerError: if the loss is not finite, or the metric that selects the best model is not computed.
        """
        found, decisive = self.measure(model, self.local / DETAILS), self.args.metric_for_best_model
        metrics = {f"eval_{name}": value for name, value in found.items()}
        if decisive not in (*found, *metrics):
            raise WorkerError(f"evaluation.metric {decisive!r} is not among: {', '.join(found)}")
        return metrics

    def note_best(self, metrics: Mapping[str, float], state: TrainerState) -> bool:
        """Records the model if it is better than the best so far by the selected metric; of equals, by the loss.

        :returns: whether it is.
        """
        name, sign = f"eval_{self.args.metric_for_best_model}", 1 if self.args.greater_is_better else -1
        best = [one for one in state.log_history if one["step"] == state.best_global_step and name in one]
        if best and not math.isnan(best[-1][name]):
            mine, before = ((sign * one[name], -one["eval_loss"]) for one in (metrics, best[-1]))
            if not mine > before:
                return False
        state.best_metric, state.best_global_step = metrics[name], state.global_step
        return True

    def measure(self, model: Any, details: Path | None = None) -> dict[str, float]:
        """Computes a model's metrics with the precision of training. :param details: as for `evaluate.evaluate`."""
        device = self.args.device
        low = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(device.type, low, enabled=self.args.bf16 or self.args.fp16):
            return evaluate(
                self.config.recipe, model, self.rows["eval"], self.collate["eval"],
                self.args.per_device_train_batch_size * 2, device, details,
            )  # fmt: skip

    def throughput(self) -> dict[str, Any]:
        """Returns the throughput of all processes together."""
        batch = self.config.spec.batch
        cut = self.args.per_device_train_batch_size
        return self.clock.figures(self.sampler.lengths, batch.size, cut, batch.by_length)

    def check(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """Returns the loss of a step, counted from 1. :raises WorkerError: if it is not finite."""
        if not torch.isfinite(loss):
            raise WorkerError(f"the loss is {loss.item()} at step {step}; {NO_NUMBERS}")
        return loss

    def save(self, write: Callable[[], Path], state: TrainerState) -> None:
        """Saves a checkpoint on this machine and then in the output folder.

        :param write: writes this process's files; the folder that it returns is the same in the processes of a machine.
        :raises WorkerError: if weights are not finite, or the training no longer holds the output.
        :raises OSError: if it cannot be written.
        """
        check_weights(self.model, state.global_step)
        self.config.check()
        try:
            self._upload(write(), state)
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {state.global_step} cannot be written to {redact(self.config.state)}: "
                f"{one_line(error)}; free space or grant access, then run again"
            ) from error

    def _upload(self, folder: Path, state: TrainerState) -> None:
        """Uploads the files of this process; the first process commits the checkpoint."""
        if (self.local / DETAILS).exists():  # of this step's evaluation, in the first process
            shutil.move(self.local / DETAILS, folder / DETAILS)
        self._wait()
        step = state.global_step
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        mine = self.checkpoints.upload(folder, step, [name for name in names if self._writes(name)])
        sums: list[Any] = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(sums, mine)
        if self.rank == 0:
            self.config.check()
            self.checkpoints.commit(step, {name: one for part in sums for name, one in part.items()})
            self.checkpoints.prune(step, self.config.spec.evaluation.keep, state.best_global_step)
        self._wait()

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _writes(self, name: str) -> bool:
        """Returns whether this process uploads a file: its own random state, and in the first process all others.

        The training arguments are not uploaded: nothing reads them, and they are a pickle of arbitrary objects.
        """
        if name == TRAINING_ARGS_NAME:
            return False
        stem = Path(name).stem
        return stem == f"rng_state_{self.rank}" if stem.startswith("rng_state_") else self.rank == 0


def newest_for_all(checkpoints: Checkpoints, local: Path, rank: int, world: int) -> Path | None:
    """Fetches the newest valid checkpoint, the same one in every process."""
    found = checkpoints.newest(local / str(rank)) if rank == 0 else None
    chosen = [found[0] if found else None]
    if world > 1:
        dist.broadcast_object_list(chosen)
    if rank == 0 or chosen[0] is None:
        return found[1] if found else None
    folder = checkpoints.fetch(chosen[0], local / str(rank))
    if folder is None:
        raise WorkerError(
            f"the checkpoint of step {chosen[0]} can be read by one process but not by another; share the output folder "
            "among all nodes"
        )
    return folder


def collator(recipe: Recipe, model: Any) -> Callable[[FeatureRows], Collate]:
    """Returns a function that makes the collate function of rows: row numbers to the arguments of forward, and labels.

    The labels of NO_ROW are IGNORED.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    known = {*inspect.signature(inner.forward).parameters, "labels"}

    def of(rows: FeatureRows) -> Collate:
        def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
            batch = recipe.collate(rows.take([max(number, 0) for number in numbers]))
            batch["labels"][[number == NO_ROW for number in numbers]] = IGNORED
            return {name: value for name, value in batch.items() if name in known}

        return collate

    return of


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Checks that all trainable weights are finite. :raises WorkerError: if they are not."""
    changed = (weight for weight in model.parameters() if weight.requires_grad)
    mine = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in changed)  # of FSDP
    if not all(bool(weight.isfinite().all()) for weight in mine):
        raise WorkerError(f"weights are not finite after step {step}; {NO_NUMBERS}")
