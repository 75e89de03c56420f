"""Training throughput: padding of steps, and their duration. Does not import Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from transformers import TrainerCallback

from hfbatch.train.loop.sampler import NO_ROW, ShuffledRows


def padding_share(lengths: np.ndarray, step: int, per_device: int, seed: int, by_length: bool) -> float:
    """Computes the share of padding in an epoch, including the rows that pad the last step.

    :param lengths: length of each row, int64 [rows].
    :param step: rows of an optimizer step.
    :param per_device: rows of a forward pass, which divide the step.
    """
    order = np.array(list(ShuffledRows(lengths, step, seed, by_length)))
    real = np.where(order == NO_ROW, 0, lengths[order])
    computed = lengths[np.maximum(order, 0)].reshape(-1, per_device).max(axis=1) * per_device
    return 1 - float(real.sum() / max(computed.sum(), 1))


class StepClock(TrainerCallback):
    """Measures the duration of steps: data, forward, backward and optimizer, without evaluations and checkpoints.

    The first step of the process is excluded as warm-up.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Adds the time of a step."""
        now = time.perf_counter()
        if self._since is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self._since
        self._since = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restarts the clock, since the time since the last step was not training."""
        if self._since is not None:
            self._since = time.perf_counter()

    on_save = on_evaluate

    def figures(self, lengths: np.ndarray, step: int, per_device: int, by_length: bool) -> dict[str, Any]:
        """Returns measured `steps` and their `seconds`; `rows_per_s`, `tokens_per_s` (None without steps); `padding`.

        :param lengths: length of each row, int64 [rows].
        :param step: rows of an optimizer step.
        """
        rate = self.steps * min(step, len(lengths)) / self.seconds if self.seconds else None
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "rows_per_s": rate,
            "tokens_per_s": None if rate is None else rate * float(lengths.mean()),
            "padding": padding_share(lengths, step, per_device, 0, by_length),
        }
