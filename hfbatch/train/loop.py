"""The training process: builds model and rows, goes on from the newest checkpoint, trains, leaves the best model.

Runs once in each process that Ray Train starts, on transformers' Trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from hfbatch.compute.precision import native_dtype
from hfbatch.data.filesystem import join, one_line, redact
from hfbatch.errors import WorkerError
from hfbatch.train.checkpoints import Checkpoints
from hfbatch.train.evaluate import NO_NUMBERS, Collate, evaluate
from hfbatch.train.export import export_model
from hfbatch.train.model import build_model, trainable
from hfbatch.train.order import TrainOrder, shares
from hfbatch.train.recipes.base import IGNORED, LOWER_IS_BETTER, Recipe
from hfbatch.train.rows import FeatureRows
from hfbatch.train.sampler import NO_ROW, ShuffledRows

Tell = Callable[[dict[str, Any]], None]
"""Takes news of the training to the driver."""
ASK_EVERY = 5
"""Steps between two questions whether a machine is about to leave: each is a round trip of some milliseconds."""
OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "adamw_8bit": "adamw_bnb_8bit"}
LEARNING_RATES = {"full": 5e-5, "head": 1e-3, "lora": 2e-4, "qlora": 2e-4}


def train(
    order: TrainOrder,
    local: Path,
    rank: int,
    world: int,
    tell: Tell,
    leaving: Callable[[], bool] | None = None,
) -> None:
    """Trains to the end in this process, one of `world`; what it leaves is in the output folder.

    :param local: an empty folder on this machine.
    :param tell: used by the first process alone.
    :param leaving: whether a machine is about to be taken away; the processes ask together, and hear the same.
    """
    recipe, spec = order.recipe, order.spec
    rows = {part: FeatureRows(join(order.features, part), local / part) for part in ("train", "eval")}
    model = build_model(spec, recipe)
    collate = collator(recipe, model)
    checkpoints = Checkpoints(join(order.state, "checkpoints"))
    trainer = BatchTrainer(
        order, model, rows, collate, checkpoints, local, world, tell if rank == 0 else None
    )
    if leaving is not None:
        trainer.add_callback(SaveBeforeLeaving(leaving))
    found = newest_for_all(checkpoints, local / "resume", rank, world)
    state = None if found is None else TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))
    if state is not None and is_over(state):
        trainer.state = state  # nothing is left but to export
    else:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
    if rank == 0:
        best = trainer.state.best_global_step or max(checkpoints.steps())
        export_model(order, checkpoints, best, local / "best")
        changed, weights = trainable(model)
        tell(
            {
                "done": True,
                "best_step": best,
                "resumed_at": state.global_step if state else 0,
                "log": trainer.state.log_history,
                "baseline": recipe.baseline(rows["eval"].table),
                "trainable": changed,
                "weights": weights,
            }
        )


def is_over(state: TrainerState) -> bool:
    """Whether training had ended when a checkpoint was saved: by its steps, or early."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]


def newest_for_all(checkpoints: Checkpoints, local: Path, rank: int, world: int) -> Path | None:
    """The newest valid checkpoint, the same for every process."""
    found = checkpoints.newest(local / str(rank)) if rank == 0 else None
    chosen = [found[0] if found else None]
    if world > 1:
        dist.broadcast_object_list(chosen)
    if rank == 0 or chosen[0] is None:
        return found[1] if found else None
    folder = checkpoints.fetch(chosen[0], local / str(rank))
    if folder is None:
        raise WorkerError(
            f"the checkpoint of step {chosen[0]} is there for one process and not for another; is the output folder shared?"
        )
    return folder


def collator(recipe: Recipe, model: Any) -> Callable[[FeatureRows], Collate]:
    """Makes, of rows, what turns their numbers into a batch: what the model's forward takes, and labels.

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


def arguments(order: TrainOrder, local: Path, world: int) -> TrainingArguments:
    """The spec as transformers' TrainingArguments."""
    spec, schedule, every = order.spec, order.spec.schedule, order.spec.evaluation.every
    rate = LEARNING_RATES[spec.method.name] if schedule.learning_rate == "auto" else schedule.learning_rate
    dtype = native_dtype()[1] if spec.compute.dtype == "auto" else spec.compute.dtype
    per_device, accumulation = shares(spec.batch.size, spec.batch.per_device, world)
    metric = spec.evaluation.metric or order.recipe.metric
    when = {"eval_strategy": "epoch"} if every == "epoch" else {"eval_strategy": "steps", "eval_steps": every}
    saved = (
        {"save_strategy": "epoch"} if every == "epoch" else {"save_strategy": "steps", "save_steps": every}
    )
    return TrainingArguments(
        output_dir=str(local / "run"),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=schedule.epochs,
        max_steps=schedule.steps or -1,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup" if schedule.scheduler == "constant" else schedule.scheduler,
        warmup_steps=schedule.warmup if schedule.warmup < 1 else int(schedule.warmup),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        optim=OPTIMIZERS[schedule.optimizer],
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        gradient_checkpointing=spec.compute.gradient_checkpointing,
        torch_compile=spec.compute.compile,
        full_determinism=spec.compute.deterministic,
        seed=spec.seed,
        metric_for_best_model=metric,
        greater_is_better=metric not in LOWER_IS_BETTER,
        logging_steps=10,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        save_total_limit=1,
        restore_callback_states_from_checkpoint=True,
        **when,
        **saved,
    )


class BatchTrainer(Trainer):
    """transformers' Trainer with our order of rows, loss, evaluation and checkpoints."""

    def __init__(
        self,
        order: TrainOrder,
        model: Any,
        rows: dict[str, FeatureRows],
        collate: Callable[[FeatureRows], Collate],
        checkpoints: Checkpoints,
        local: Path,
        world: int,
        tell: Tell | None,
    ) -> None:
        self._order, self._rows, self._checkpoints = order, rows, checkpoints
        self._collate_eval = collate(rows["eval"])
        batch = order.spec.batch
        self.sampler = ShuffledRows(rows["train"].lengths, batch.size, order.spec.seed, batch.by_length)
        patience = order.spec.evaluation.patience
        super().__init__(
            model=model,
            args=arguments(order, local, world),
            data_collator=collate(rows["train"]),
            train_dataset=rows["train"],
            eval_dataset=rows["eval"],
            processing_class=order.recipe.processor,
            compute_loss_func=order.recipe.loss,
            callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        )
        self.add_callback(MeasuredFirst(self))
        self.add_callback(EpochOrder(self.sampler))
        if tell is not None:
            self.add_callback(News(tell))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass. :raises WorkerError: when the loss is no number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise WorkerError(f"the loss is {loss.item()} at step {self.state.global_step + 1}; {NO_NUMBERS}")
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Metrics of the rows to measure with, `eval_` before their names.

        :raises WorkerError: when the loss is no number, or the metric that decides is not among the metrics.
        """
        found = evaluate(
            self._order.recipe, self.model, self._rows["eval"], self._collate_eval,
            self.args.per_device_train_batch_size * 2, self.args.device,
        )  # fmt: skip
        metrics = {f"eval_{name}": value for name, value in found.items()}
        if self.args.metric_for_best_model not in (*found, *metrics):
            raise WorkerError(
                f"evaluation.metric {self.args.metric_for_best_model!r} is not among: {', '.join(found)}"
            )
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves on this machine, then to the output folder: every process its own files, the first one commits.

        :raises WorkerError: when the weights are no numbers.
        :raises OSError: when it cannot be written.
        """
        step = self.state.global_step
        check_weights(self.model, step)
        try:
            super()._save_checkpoint(model, trial)
            self._upload(step, self.args.world_size)
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} cannot be written to {redact(self._order.state)}: {one_line(error)}; "
                "make room or give access, then run again"
            ) from error

    def _upload(self, step: int, world: int) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if world > 1:
            dist.barrier()
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        mine = self._checkpoints.upload(folder, step, [name for name in names if self._writes(name)])
        sums: list[Any] = [mine] * world
        if world > 1:
            dist.all_gather_object(sums, mine)
        if self.is_world_process_zero():
            self._checkpoints.commit(step, {name: one for part in sums for name, one in part.items()})
            self._checkpoints.prune(step, self._order.spec.evaluation.keep, self.state.best_global_step)
        if world > 1:
            dist.barrier()

    def _writes(self, name: str) -> bool:
        """Whether a file of a checkpoint is this process's to write: its random state, and all else for the first.

        Nobody writes the arguments: nothing reads them, and they are a pickle of arbitrary objects.
        """
        if name == TRAINING_ARGS_NAME:
            return False
        stem = Path(name).stem
        if stem.startswith("rng_state_"):
            return stem == f"rng_state_{self.args.process_index}"
        return self.is_world_process_zero()


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Whether what training changes is numbers still. :raises WorkerError: if it is not."""
    if not all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad):
        raise WorkerError(f"weights are no finite numbers after step {step}; {NO_NUMBERS}")


class MeasuredFirst(TrainerCallback):
    """Measures the model before its first step: what training adds is told against that."""

    def __init__(self, trainer: BatchTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing, where training goes on."""
        if not state.log_history:
            self.trainer.evaluate()


class EpochOrder(TrainerCallback):
    """Tells the order of rows which epoch it is.

    Accelerate does not, where several processes go on in the middle of an epoch: they saw the first one's order again.
    """

    def __init__(self, sampler: ShuffledRows) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The state's epoch is whole then, but where training goes on in its middle."""
        self.sampler.set_epoch(int(state.epoch or 0))


class SaveBeforeLeaving(TrainerCallback):
    """Saves a checkpoint, once, when a machine is about to be taken away."""

    def __init__(self, leaving: Callable[[], bool]) -> None:
        self.leaving = leaving
        self.saved = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Not at the end of an epoch, nor of training: what is to be measured there is measured before it is saved."""
        if state.global_step % ASK_EVERY:
            return
        end = control.should_training_stop or float(state.epoch).is_integer()
        if self.leaving() and not self.saved and not end:
            control.should_save = self.saved = True


class News(TrainerCallback):
    """Takes steps, losses and metrics to the driver."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """A loss or metrics."""
        self.tell({"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch, **(logs or {})})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step."""
        self.tell({"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch})
