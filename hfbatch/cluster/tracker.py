"""The tracker: a small actor on the driver's node that records what the workers are doing.

It counts attempts, so that a split that kills its process is failed. It holds the runtime choice that the first
worker makes for all, and the progress. Processes send heartbeats every few seconds, which distinguishes a slow split
from a dead worker. It holds nothing that a rerun needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_ATTEMPTS = 3
"""A split whose process died this often fails."""
ALIVE_S = 60.0
"""Seconds without a heartbeat after which work no longer counts as running."""
ANSWER_S = 600.0
"""Seconds that a worker waits for the tracker's answer; the driver ends a job with a silent tracker before that."""
LOAD = "load"
"""The stage in which a worker loads the model; it is recorded under the process's id in place of a split."""


@dataclass
class Activity:
    """The progress of the workers so far."""

    rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    workers: int = 0
    """Workers that have loaded the model."""
    first_loaded: float = 0.0
    """Unix time when the first worker was ready; 0 until then."""
    first_batch: float = 0.0
    """Unix time when the first batch of the job began; 0 until then."""
    last_sign: float = field(default_factory=time.time)
    """Unix time of the last heartbeat."""
    last_progress: float = field(default_factory=time.time)
    """Unix time when a batch, a split or a load last began or ended."""
    reading: int = 0
    """Rows of the splits being read and preprocessed."""
    oldest: float = 0.0
    """Unix time when the split that has spent the longest in its stage entered it; 0 without one."""
    oldest_part: str = ""
    loading: float = 0.0
    """Unix time when the longest current load of the model began; 0 without one."""
    proposal: dict[str, Any] | None = None
    """The runtime choice of the first worker."""


@dataclass
class _Work:
    """A stage of a split, or a load of the model, in a process."""

    rows: int
    began: float
    """Unix time."""
    sign: float
    """Unix time of the last heartbeat of its process."""


class TrackerState:
    """The tracker's state and methods; `start_tracker` creates an actor of this class."""

    def __init__(self, choice: dict[str, Any] | None) -> None:
        self._activity = Activity()
        self._choice = choice
        self._attempts: dict[tuple[str, str], int] = {}
        self._under_way: dict[tuple[str, str], _Work] = {}

    def attempt(self, stage: str, part: str, rows: int = 0) -> int:
        """Records that a stage begins a split; returns how often it has begun without ending."""
        self._sign()
        key = stage, part
        self._under_way[key] = _Work(rows, time.time(), time.time())
        self._attempts[key] = self._attempts.get(key, 0) + 1
        return self._attempts[key]

    def beat(self, stage: str, part: str) -> None:
        """Records a heartbeat of the process that works on a split."""
        self._activity.last_sign = time.time()
        if (stage, part) in self._under_way:
            self._under_way[stage, part].sign = time.time()

    def end(self, stage: str, part: str) -> None:
        """Records that a stage ended, successfully or not, with its process alive."""
        self._sign()
        self._under_way.pop((stage, part), None)
        self._attempts.pop((stage, part), None)

    def loaded(self) -> None:
        """Records that a worker is ready."""
        self._sign()
        self._activity.workers += 1
        self._activity.first_loaded = self._activity.first_loaded or time.time()

    def begin_batches(self) -> None:
        """Records that batches of the job begin."""
        self._sign()
        self._activity.first_batch = self._activity.first_batch or time.time()

    def advance(self, rows: int, tokens: int, padded_tokens: int) -> None:
        """Adds the rows and tokens computed since the last call."""
        self._sign()
        self._activity.rows += rows
        self._activity.tokens += tokens
        self._activity.padded_tokens += padded_tokens

    def propose(self, choice: dict[str, Any]) -> None:
        """Proposes a runtime choice for the whole job; the first proposal wins."""
        self._sign()
        self._activity.proposal = self._activity.proposal or choice

    def confirm(self, choice: dict[str, Any]) -> None:
        """Makes the runtime choice final; the driver calls this when it is on disk."""
        self._choice = choice

    def choice(self) -> dict[str, Any] | None:
        """Returns the final runtime choice; None before it is made."""
        return self._choice

    def activity(self) -> Activity:
        """Returns the progress, for the driver."""
        living = {key: one for key, one in self._under_way.items() if time.time() - one.sign < ALIVE_S}
        splits = {key: one for key, one in living.items() if key[0] != LOAD}
        oldest = min(splits, key=lambda key: splits[key].began, default=None)
        return replace(
            self._activity,
            reading=sum(one.rows for one in splits.values()),
            oldest=splits[oldest].began if oldest else 0.0,
            oldest_part=oldest[1] if oldest else "",
            loading=min((one.began for key, one in living.items() if key[0] == LOAD), default=0.0),
        )

    def _sign(self) -> None:
        self._activity.last_sign = self._activity.last_progress = time.time()


def start_tracker(choice: dict[str, Any] | None) -> Any:
    """Starts a tracker on the driver's node, which outlives every other node of the job."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(TrackerState).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(choice)
