"""The process that holds an output, and whether it is known to be alive or dead."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

FRESH_S = 30.0
"""Seconds since the last heartbeat within which a holder on this machine counts as alive."""


@dataclass(frozen=True)
class Holder:
    """The process that holds an output."""

    user: str
    host: str
    pid: int
    machine: str
    """Boot and process namespace, within which a pid identifies a process; empty if unknown."""
    process: str
    """Start of the process in ticks since boot, since pids are reused."""
    since: str
    token: str
    """Identifies this hold."""
    renewed: float
    """Unix time of the last heartbeat."""
    clock: float
    """The machine's monotonic clock at the last heartbeat."""

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        """Parses a lock file; returns None if it is truncated or not a lock file."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def dump(self) -> bytes:
        """Returns the content of the lock file."""
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def here(self) -> bool:
        """Whether its process is visible to this one."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended."""
        if not self.here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        started = _process(self.pid)
        return started is not None and started != self.process

    @property
    def fresh(self) -> bool:
        """Whether it runs on this machine and has sent a heartbeat lately."""
        return self.here and 0 <= time.monotonic() - self.clock < FRESH_S

    def __str__(self) -> str:
        return f"{self.user}@{self.host}, process {self.pid}, since {self.since}"


def this_process() -> Holder:
    """Returns this process as a new holder."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return Holder(
        user, socket.gethostname(), os.getpid(), _machine(), _process(os.getpid()) or "",
        datetime.now(UTC).isoformat(timespec="seconds"), uuid.uuid4().hex, time.time(), time.monotonic(),
    )  # fmt: skip


def _machine() -> str:
    """Returns the scope in which pids are unique: one boot of one machine, one process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> str | None:
    """Returns the start of a process in ticks since boot; `ended` for a zombie process; None if unknown."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZXx" else fields[19]
