"""What both loops do between steps, as callbacks of transformers: measure, save, tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from hfbatch.train.sampler import ShuffledRows

Tell = Callable[[dict[str, Any]], None]
"""Takes news of the training to the driver."""
ASK_EVERY = 5
"""Steps between two questions whether a machine is about to leave: each is a round trip of some milliseconds."""


class MeasuredFirst(TrainerCallback):
    """Measures the model before its first step: what training adds is told against that."""

    def __init__(self, measure: Callable[[], object]) -> None:
        self.measure = measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing, where training goes on."""
        if not state.log_history:
            self.measure()


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
