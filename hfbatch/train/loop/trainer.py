"""The training loop of transformers' Trainer, with hfbatch's sampler, loss, evaluation and checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState

from hfbatch.train.loop.fsdp import embeddings_with_the_rest, keep_precise, states_may_lack
from hfbatch.train.loop.model import load_weights
from hfbatch.train.loop.training import Training


def run_trainer(training: Training, resume: Path | None) -> TrainerState:
    """Runs all steps, or those after a checkpoint. :returns: losses and metrics, and the best step."""
    trainer = BatchTrainer(training)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.state


class BatchTrainer(Trainer):
    """transformers' Trainer for a `Training`."""

    def __init__(self, training: Training) -> None:
        self._training = training
        super().__init__(
            model=training.model,
            args=training.args,
            data_collator=training.collate["train"],
            train_dataset=training.rows["train"],
            eval_dataset=training.rows["eval"],
            processing_class=training.config.recipe.processor,
            compute_loss_func=training.config.recipe.loss,
            callbacks=training.callbacks(self.evaluate),
        )
        if self.is_fsdp_enabled:
            keep_precise(self.accelerator.state.fsdp_plugin)
        if self.accelerator.ddp_handler is not None:
            # Gradients are views of the all-reduce buffers, which avoids a copy.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._training.sampler

    def _prepare_for_training(self, *args: Any) -> Any:
        """Wraps the model for distributed training."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args)
        with embeddings_with_the_rest(self.model):
            return super()._prepare_for_training(*args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restores optimizer and scheduler."""
        with states_may_lack() if self.is_fsdp_enabled else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs one forward and backward pass. :raises WorkerError: if the loss is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        return self._training.check(loss, self.state.global_step + 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Computes metrics of the evaluation set, prefixed by `eval_`."""
        metrics = self._training.evaluate(self.model)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Records the best model; transformers' method keeps the first of equals, which has trained the least."""
        return self._training.note_best(metrics, self.state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores all weights; transformers' method loads those whose names match, and only warns of others."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the model; drops the duplicate names of tied weights from the state dict of a sharded model."""
        if self.is_fsdp_enabled and state_dict is not None:
            again = getattr(self.model, "all_tied_weights_keys", None) or ()
            state_dict = {name: weight for name, weight in state_dict.items() if name not in again}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves on this machine, then in the output folder."""

        def write() -> Path:
            super(BatchTrainer, self)._save_checkpoint(model, trial)
            return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

        self._training.save(write, self.state)
