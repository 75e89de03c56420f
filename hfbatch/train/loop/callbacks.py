"""transformers callbacks of both loops: evaluation before training, epochs, checkpoints, news to the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hfbatch.train.loop.sampler import ShuffledRows

Report = Callable[[dict[str, Any]], None]
"""Sends news of the training to the driver."""
ASK_EVERY = 5
"""Steps between checks whether a machine is about to be removed: each takes a round trip of some milliseconds."""


class MeasuredFirst(TrainerCallback):
    """Evaluates the model before its first step, for comparison with the trained model."""

    def __init__(self, measure: Callable[[], object]) -> None:
        self.measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluates, unless training is resumed."""
        if not state.log_history:
            self.measure()


class EpochOrder(TrainerCallback):
    """Sets the epoch of the sampler.

    Accelerate does not if several processes resume within an epoch: they would repeat the order of the first epoch.
    """

    def __init__(self, sampler: ShuffledRows) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets the epoch, which is fractional in the state if training resumes within an epoch."""
        self.sampler.set_epoch(int(state.epoch or 0))


class SaveBeforeLeaving(TrainerCallback):
    """Saves a checkpoint, once, when a machine is about to be removed."""

    def __init__(self, leaving: Callable[[], bool]) -> None:
        self.leaving = leaving
        self.saved = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Requests a checkpoint, except at the end of an epoch or of training, where evaluation precedes saving."""
        if state.global_step % ASK_EVERY:
            return
        end = control.should_training_stop or float(state.epoch).is_integer()
        if self.leaving() and not self.saved and not end:
            control.should_save = self.saved = True


class News(TrainerCallback):
    """Sends steps, losses and metrics to the driver."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Sends a loss or metrics."""
        self.report(
            {"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch, **(logs or {})}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sends a step."""
        self.report({"step": state.global_step, "steps": state.max_steps, "epoch": state.epoch})
