"""The training loop on plain Accelerate: all steps in one class that is easy to read and to change.

Rows, loss, evaluation, checkpoints and callbacks are those of the other loop, and so are the resulting weights, up to
rounding. Sharded and compiled models need transformers' Trainer.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_pt_utils import get_parameter_names

from hfbatch.train.loop.model import load_weights
from hfbatch.train.loop.training import Training
from hfbatch.train.recipes.base import IGNORED

UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Name patterns of weights without decay, as in transformers' Trainer."""


class PlainLoop:
    """The training loop of one of the processes that Ray Train starts."""

    def __init__(self, training: Training) -> None:
        self.training, self.args, self.recipe = training, training.args, training.config.recipe
        self.size = training.config.spec.batch.size
        self.each_epoch = len(training.sampler) // self.size
        epochs = self.args.num_train_epochs
        self.steps = self.args.max_steps if self.args.max_steps > 0 else math.ceil(epochs * self.each_epoch)
        # Some weights are unused in a step, such as wav2vec2's embedding of masked frames. Finding them is not
        # possible with gradient checkpointing.
        shared = DistributedDataParallelKwargs(
            find_unused_parameters=not self.args.gradient_checkpointing, gradient_as_bucket_view=True
        )
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no",
            cpu=self.args.use_cpu,
            kwargs_handlers=[shared],
        )
        if self.args.gradient_checkpointing:
            training.model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = optimizer_of(training.model, self.args)
        self.model, self.optimizer = self.accelerator.prepare(training.model, optimizer)
        warmup = self.args.get_warmup_steps(self.steps)
        self.scheduler = get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, self.steps)
        self.control = TrainerControl()
        self.handler = CallbackHandler(
            [DefaultFlowCallback(), *training.callbacks(self.evaluate)],
            training.model, self.recipe.processor, self.optimizer, self.scheduler,
        )  # fmt: skip
        self.state = TrainerState(
            max_steps=self.steps, log_history=[], eval_steps=int(self.args.eval_steps or 0)
        )
        self.state.logging_steps, self.state.save_steps = (
            int(self.args.logging_steps),
            int(self.args.save_steps),
        )
        self.state.is_world_process_zero = self.state.is_local_process_zero = training.rank == 0
        self._losses: list[float] = []
        self._rows: tuple[int, list[int]] = -1, []

    def run(self, resume: Path | None) -> TrainerState:
        """Runs all steps, or those after a checkpoint. :returns: losses and metrics, and the best step."""
        if resume is not None:
            self.load(resume)
        self._now("on_train_begin")
        while self.state.global_step < self.steps and not self.control.should_training_stop:
            if self.state.global_step % self.each_epoch == 0:
                self._now("on_epoch_begin")
            self._now("on_step_begin")
            self._losses.append(self.step(self.state.global_step))
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.each_epoch
            self._now("on_step_end")
            self._follow()
            if self.state.global_step % self.each_epoch == 0 or self.state.global_step == self.steps:
                self._now("on_epoch_end")
                self._follow()
        self._now("on_train_end")
        return self.state

    def step(self, number: int) -> float:
        """Runs one optimizer step. :param number: from 0. :returns: the mean loss of its items, over all processes."""
        rank, world, cut = self.training.rank, self.training.world, self.args.per_device_train_batch_size
        rows = self.rows_of(number)
        batches = [
            self.batch(rows[start : start + cut]) for start in range(rank * cut, self.size, world * cut)
        ]
        items = self.accelerator.reduce(sum(batch["labels"].ne(IGNORED).sum() for batch in batches))
        total = torch.zeros((), device=self.accelerator.device)
        self.model.train()
        for batch in batches:
            labels = batch.pop("labels")
            waits = nullcontext() if batch is batches[-1] else self.accelerator.no_sync(self.model)
            with waits, self.accelerator.autocast():
                # Each loss is a part of one sum, but gradients are averaged over the processes.
                loss = self.recipe.loss(self.model(**batch), labels, items) * world
                self.accelerator.backward(loss)
            total += self.training.check(loss.detach(), number + 1)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(total)) / world

    def rows_of(self, number: int) -> list[int]:
        """Returns the row numbers of a step."""
        epoch, place = divmod(number, self.each_epoch)
        if self._rows[0] != epoch:
            self.training.sampler.set_epoch(epoch)
            self._rows = epoch, list(self.training.sampler)
        return self._rows[1][place * self.size : (place + 1) * self.size]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Returns a batch of rows on the model's device."""
        made = self.training.collate["train"](rows)
        return {name: value.to(self.accelerator.device) for name, value in made.items()}

    def evaluate(self) -> None:
        """Evaluates the model, and records it if it is the best so far."""
        metrics = self.training.evaluate(self.accelerator.unwrap_model(self.model))
        self._log(metrics)
        self._now("on_evaluate", metrics)
        if self.state.global_step:
            self.training.note_best(metrics, self.state)

    def save(self) -> None:
        """Saves a checkpoint, with the file names of transformers' Trainer."""
        self.state.stateful_callbacks["TrainerControl"] = self.control.state()
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.training.save(self._write, self.state)
        self._now("on_save")

    def load(self, folder: Path) -> None:
        """Restores a checkpoint; random states are restored only with the same number of processes."""
        load_weights(self.accelerator.unwrap_model(self.model), folder)
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        for callback in self.handler.callbacks:
            known = self.state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and known:
                for name, value in known["attributes"].items():
                    setattr(callback, name, value)
        if (folder / self._random_file).exists():
            states = torch.load(folder / self._random_file, weights_only=True)
            torch.set_rng_state(states["cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])

    def _now(self, event: str, *more: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, *more)

    def _follow(self) -> None:
        """Logs, evaluates and saves as the callbacks request."""
        if self.control.should_log and self._losses:
            rate = self.scheduler.get_last_lr()[0]
            self._log({"loss": sum(self._losses) / len(self._losses), "learning_rate": rate})
            self._losses.clear()
        if self.control.should_evaluate:
            self.evaluate()
        if self.control.should_save:
            self.save()

    def _log(self, values: dict[str, float]) -> None:
        logs = {**values, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._now("on_log", logs)

    def _write(self) -> Path:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.training.rank == 0:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)
            self.recipe.processor.save_pretrained(folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        torch.save(states, folder / self._random_file)
        return folder

    @property
    def _random_file(self) -> str:
        return f"rng_state_{self.training.rank}.pth" if self.training.world > 1 else "rng_state.pth"


def optimizer_of(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    """Builds the optimizer of the spec, with weight decay for matrices only."""
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], UNDECAYED))
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for name, weight in weights if name in decayed],
            "weight_decay": args.weight_decay,
        },
        {"params": [weight for name, weight in weights if name not in decayed], "weight_decay": 0.0},
    ]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return kind(groups, **options)
