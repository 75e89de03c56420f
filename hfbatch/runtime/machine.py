"""Resources of a machine: Ray's counts, and the cores and memory that this process may use; garbage collection."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """The resources of one machine in Ray."""

    cpus: float
    gpus: float


def usable_cores() -> int:
    """Returns the number of cores in the affinity mask, limited to the container's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota, _ = cgroup_limits()
    return max(min(allowed, int(quota)), 1) if quota else allowed


def cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[float | None, int | None]:
    """Returns the cores and bytes that the control groups of this process allow; None for no limit.

    Reads version 2 and version 1. The limits of parent groups apply too, and in a container the group's own path
    may not be visible, so every existing level counts.
    """
    cores: list[float] = []
    memory: list[int] = []
    lines = membership.read_text(encoding="utf8").splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for name in controllers.split(","):
            for level in _levels(root / name, path):
                cores.extend(_cores(level))
                memory.extend(_memory(level))
    return min(cores, default=None), min(memory, default=None)


def free_memory() -> int:
    """Returns the bytes of memory that are free where models run: on the GPU if torch uses one, else on this machine."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return host_memory()[1]


def host_memory() -> tuple[int, int]:
    """Returns the bytes of memory of this machine, and those that are free, within the limit of the container."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    total, free = (int(facts[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    _, limit = cgroup_limits()
    return total, min(free, limit or free)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Disables Python's garbage collector inside the context.

    torch and transformers import some 4,000 modules, all of which stay: scanning them repeatedly took a sixth of a
    worker's start time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _levels(root: Path, path: str) -> list[Path]:
    here = Path(path.lstrip("/"))
    return [root / level for level in (here, *here.parents)]


def _cores(level: Path) -> list[float]:
    both = _words(level / "cpu.max")  # version 2: "quota period"
    both = both or [*_words(level / "cpu.cfs_quota_us"), *_words(level / "cpu.cfs_period_us")]
    return [int(both[0]) / int(both[1])] if len(both) == 2 and both[0] not in ("max", "-1") else []


def _memory(level: Path) -> list[int]:
    words = _words(level / "memory.max") or _words(level / "memory.limit_in_bytes")
    # Version 1 writes "no limit" as the largest multiple of a page.
    return [int(word) for word in words if word != "max" and int(word) < 2**60]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
