"""The training process on plain Accelerate: the steps of a training in one class, to read and to change.

Rows, loss, evaluation, checkpoints and what the spec means are those of `loop`, and so are the weights that come
out, but for rounding. Sharded models are left to transformers' Trainer.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from hfbatch.train.loop import Setup, Tell, finite, measure, save_together
from hfbatch.train.recipes.base import IGNORED
from hfbatch.train.sampler import ShuffledRows

LOG_EVERY = 10
"""Steps between two losses that are told."""
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights without decay, as in transformers' Trainer."""


class PlainLoop:
    """Trains in this process, one of several that Ray Train started.

    :param setup: what both loops work on.
    :param tell: takes news to the driver; None in all processes but the first.
    """

    def __init__(self, setup: Setup, tell: Tell | None) -> None:
        self.setup, self.args, self.tell = setup, setup.args, tell
        self.recipe, self.model = setup.order.recipe, setup.model
        self.sampler = ShuffledRows(
            setup.rows["train"].lengths,
            setup.order.spec.batch.size,
            self.args.seed,
            setup.order.spec.batch.by_length,
        )
        self.size = setup.order.spec.batch.size
        self.each_epoch = len(self.sampler) // self.size
        self.steps = (
            self.args.max_steps
            if self.args.max_steps > 0
            else round(self.args.num_train_epochs * self.each_epoch)
        )
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no",
            cpu=self.args.use_cpu,
        )
        self.optimizer = optimizer_of(self.model, self.args)
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type, self.optimizer, self.args.get_warmup_steps(self.steps), self.steps
        )
        self.state = TrainerState(max_steps=self.steps, log_history=[])
        self._losses: list[float] = []
        self._order: tuple[int, list[int]] = -1, []

    def run(self, resume: Path | None) -> TrainerState:
        """All steps from the beginning, or from a checkpoint on. :returns: losses and metrics, and the best step."""
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if resume is not None:
            self.load(resume)
        if not self.state.log_history:
            self.measure()
        while self.state.global_step < self.steps and not self.out_of_patience():
            self.model.train()
            self._losses.append(self.step(self.state.global_step))
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.each_epoch
            if self.state.global_step % LOG_EVERY == 0:
                self.log_loss()
            if self.is_due(self.state.global_step):
                self.measure()
                self.save()
            elif self.tell:
                self.tell({"step": self.state.global_step, "steps": self.steps, "epoch": self.state.epoch})
        return self.state

    def step(self, number: int) -> float:
        """One optimizer step. :param number: from 0. :returns: the mean loss of the step's items, of all processes."""
        rank, world, cut = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.per_device_train_batch_size,
        )
        rows = self.rows_of(number)
        batches = [
            {
                name: value.to(self.accelerator.device)
                for name, value in self.setup.collate(rows[start : start + cut]).items()
            }
            for start in range(rank * cut, self.size, world * cut)
        ]
        items = self.accelerator.reduce(sum(batch["labels"].ne(IGNORED).sum() for batch in batches))
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            labels = batch.pop("labels")
            last = batch is batches[-1]
            with (
                self.accelerator.autocast(),
                self.accelerator.no_sync(self.model) if not last else nullcontext(),
            ):
                # Gradients are averaged over the processes; each has its part of a sum.
                loss = self.recipe.loss(self.model(**batch), labels, items) * world
                self.accelerator.backward(loss)
            total += finite(loss.detach(), number + 1)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(total)) / world

    def rows_of(self, number: int) -> list[int]:
        """Numbers of the rows of a step."""
        epoch, place = divmod(number, self.each_epoch)
        if self._order[0] != epoch:
            self.sampler.set_epoch(epoch)
            self._order = epoch, list(self.sampler)
        return self._order[1][place * self.size : (place + 1) * self.size]

    def is_due(self, step: int) -> bool:
        """Whether the model is measured and saved after a step, counted from 1."""
        every = self.setup.order.spec.evaluation.every
        return step == self.steps or step % (self.each_epoch if every == "epoch" else every) == 0

    def measure(self) -> None:
        """Metrics of the rows to measure with; notes the best."""
        metrics = measure(self.setup, self.accelerator.unwrap_model(self.model))
        self._log(metrics)
        value, best = metrics[f"eval_{self.args.metric_for_best_model}"], self.state.best_metric
        if self.state.global_step and (
            best is None or (value > best if self.args.greater_is_better else value < best)
        ):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def out_of_patience(self) -> bool:
        """Whether as many evaluations as the spec allows have brought nothing better."""
        patience, best = self.setup.order.spec.evaluation.patience, self.state.best_global_step
        later = [
            entry for entry in self.state.log_history if "eval_loss" in entry and entry["step"] > (best or 0)
        ]
        return patience is not None and best is not None and len(later) >= patience

    def log_loss(self) -> None:
        """The mean loss since the last time."""
        self._log({"loss": float(np.mean(self._losses)), "learning_rate": self.scheduler.get_last_lr()[0]})
        self._losses.clear()

    def _log(self, values: dict[str, float]) -> None:
        where = {"step": self.state.global_step, "epoch": self.state.epoch}
        self.state.log_history.append({**values, **where})
        if self.tell:
            self.tell({**values, **where, "steps": self.steps})

    def save(self) -> None:
        """A checkpoint, in files as transformers' Trainer names them."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)
            self.recipe.processor.save_pretrained(folder)
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            torch.save(self.scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        torch.save(states, folder / self._random_file)
        save_together(self.setup, folder, self.state)

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint; random numbers go on only where there are as many processes as there were."""
        load_weights(self.accelerator.unwrap_model(self.model), folder)
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if (folder / self._random_file).exists():
            states = torch.load(folder / self._random_file, weights_only=True)
            torch.set_rng_state(states["cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])

    @property
    def _random_file(self) -> str:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"


def optimizer_of(model: Any, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer of the spec; matrices alone decay."""
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


def load_weights(model: Any, folder: Path) -> None:
    """Puts the weights of a checkpoint into a model: all of them, or its adapters."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    else:
        from safetensors.torch import load_model

        load_model(model, str(folder / "model.safetensors"))
