"""The tracker: one small actor beside the driver that knows what the workers are doing.

It counts attempts, so that a split that kills its process is given up; it holds the choices that the first
worker makes for all; and it is what progress is read from. Processes tell it every few seconds that they live, so that
a slow split is told from a dead worker. It holds nothing that a rerun needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_ATTEMPTS = 3
"""A split whose process died this often is failed by name."""
ALIVE_S = 60.0
"""Work whose process has given no sign of life for this long is not under way any more."""
ANSWER_S = 600.0
"""How long a worker waits for the tracker's answer; the driver ends a job whose tracker is silent before that."""
LOAD = "load"
"""The stage in which a worker loads the model; what stands for its split is the process."""


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
    last_progress: float = field(default_factory=time.time)
    """Unix time when a batch, a split or a load last began or came to its end."""
    reading: int = 0
    """Rows of the splits that are being read and made into features."""
    oldest: float = 0.0
    """Unix time when the split that has been in its stage for the longest entered it; 0 without one."""
    oldest_part: str = ""
    loading: float = 0.0
    """Unix time since when a process has been loading the model, the longest of them; 0 without one."""
    proposal: dict[str, Any] | None = None
    """Choices that the first worker made."""


@dataclass
class _Work:
    """A stage of a split, or a load, in a process."""

    rows: int
    began: float
    """Unix time."""
    sign: float
    """Unix time of the last sign of life of its process."""


class TrackerState:
    """The tracker's methods; an actor of this class is made by `start_tracker`."""

    def __init__(self, settled: dict[str, Any] | None) -> None:
        self._activity = Activity()
        self._settled = settled
        self._attempts: dict[tuple[str, str], int] = {}
        self._under_way: dict[tuple[str, str], _Work] = {}

    def attempt(self, stage: str, part: str, rows: int = 0) -> int:
        """Notes that a stage begins a split; returns how often it has begun without coming to its end."""
        self._sign()
        key = stage, part
        self._under_way[key] = _Work(rows, time.time(), time.time())
        self._attempts[key] = self._attempts.get(key, 0) + 1
        return self._attempts[key]

    def beat(self, stage: str, part: str) -> None:
        """Notes that the process lives that works on a split, however long that takes."""
        self._activity.last_sign = time.time()
        if (stage, part) in self._under_way:
            self._under_way[stage, part].sign = time.time()

    def end(self, stage: str, part: str) -> None:
        """Notes that a stage came to its end, well or not, with its process alive."""
        self._sign()
        self._under_way.pop((stage, part), None)
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


def start_tracker(settled: dict[str, Any] | None) -> Any:
    """A tracker on the driver's own node, which outlives every other node of the job."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(TrackerState).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(settled)
