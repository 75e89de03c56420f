"""How fast a training is: what a step computes, and how long steps take. Knows nothing of Ray and files."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from transformers import TrainerCallback

from hfbatch.train.sampler import NO_ROW, ShuffledRows


def padding_share(lengths: np.ndarray, step: int, per_device: int, seed: int, by_length: bool) -> float:
    """Share of what an epoch computes that is padding, rows that fill up the last step included.

    :param lengths: what each row costs, int64 [rows].
    :param step: rows of an optimizer step.
    :param per_device: rows of a forward pass, which divide the step.
    """
    order = np.array(list(ShuffledRows(lengths, step, seed, by_length)))
    real = np.where(order == NO_ROW, 0, lengths[order])
    computed = lengths[np.maximum(order, 0)].reshape(-1, per_device).max(axis=1) * per_device
    return 1 - float(real.sum() / max(computed.sum(), 1))


class StepClock(TrainerCallback):
    """Measures the seconds of steps: their data, forward, backward and optimizer; not evaluations and checkpoints.

    The first step of the process is left out, since it prepares what the others reuse.
    """

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._since: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._since is not None:
            self.steps, self.seconds = self.steps + 1, self.seconds + now - self._since
        self._since = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begins anew: what was done since the step is not training."""
        if self._since is not None:
            self._since = time.perf_counter()

    on_save = on_evaluate

    def figures(self, lengths: np.ndarray, step: int, per_device: int, by_length: bool) -> dict[str, Any]:
        """`steps` measured and their `seconds`; `rows_per_s`, `tokens_per_s` (None where none was measured); `padding`.

        :param lengths: what each row costs, int64 [rows].
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
