"""The tracker: one small actor beside the driver that knows what the workers are doing.

It counts attempts, so that a split that kills its process is given up; it holds the choices that the first
worker makes for all; and it is what progress is read from. It holds nothing that a rerun needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_ATTEMPTS = 3
"""A split whose process died this often is failed by name."""


@dataclass
class Activity:
    """What the workers have done so far."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    workers: int = 0
    """Workers whose model is loaded."""
    first_loaded: float = 0.0
    """Unix time when the first worker was ready; 0 until then."""
    first_batch: float = 0.0
    """Unix time when the first batch of the job began; 0 until then."""
    last_sign: float = field(default_factory=time.time)
    """Unix time of the last sign of life."""
    proposal: dict[str, Any] | None = None
    """Choices that the first worker made."""


class TrackerState:
    """The tracker's methods; an actor of this class is made by `start_tracker`."""

    def __init__(self, settled: dict[str, Any] | None) -> None:
        self._activity = Activity()
        self._settled = settled
        self._attempts: dict[tuple[str, str], int] = {}

    def attempt(self, stage: str, part: str) -> int:
        """Notes that a stage begins a split; returns how often it has begun without coming to its end."""
        self._sign()
        key = stage, part
        self._attempts[key] = self._attempts.get(key, 0) + 1
        return self._attempts[key]

    def end(self, stage: str, part: str) -> None:
        """Notes that a stage came to its end, well or not, with its process alive."""
        self._sign()
        self._attempts.pop((stage, part), None)

    def loaded(self) -> None:
        """Notes that a worker is ready."""
        self._sign()
        self._activity.workers += 1
        self._activity.first_loaded = self._activity.first_loaded or time.time()

    def begin_batches(self) -> None:
        """Notes that batches of the job begin."""
        self._sign()
        self._activity.first_batch = self._activity.first_batch or time.time()

    def advance(self, rows: int, tokens: int, padded_tokens: int) -> None:
        """Adds what was computed since the last call."""
        self._sign()
        self._activity.rows += rows
        self._activity.tokens += tokens
        self._activity.padded_tokens += padded_tokens

    def propose(self, choice: dict[str, Any]) -> None:
        """Offers choices for the whole job; the first offer wins."""
        self._sign()
        self._activity.proposal = self._activity.proposal or choice

    def confirm(self, choice: dict[str, Any]) -> None:
        """Makes choices final; the driver calls this once they are on disk."""
        self._settled = choice

    def settled(self) -> dict[str, Any] | None:
        """The final choices, None until they are made."""
        return self._settled

    def activity(self) -> Activity:
        """All of it, for the driver."""
        return self._activity

    def _sign(self) -> None:
        self._activity.last_sign = time.time()


def start_tracker(settled: dict[str, Any] | None) -> Any:
    """A tracker on the driver's own node, which outlives every other node of the job."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(TrackerState).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(settled)
