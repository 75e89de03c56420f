"""Notices that the cluster is gone, and ends the work with a sentence before Ray's library ends the process without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from hfbatch import supervisor
from hfbatch.errors import WorkerError

POLL_S = 1.0
PING_S = 5.0
PING_TIMEOUT_S = 10.0
SILENCE_S = 40.0
"""How long the cluster's head may fail to answer: one that is started again is back within this time."""
VITAL = ("gcs_server", "raylet")
"""The processes of a cluster on this machine without which it does not work."""
ENDED_BY_RAY = (
    "Ray's library ended the process, as it does without a word when the cluster's head or this machine's raylet is "
    "gone"
)


class Watch(threading.Thread):
    """Asks the cluster's head every few seconds; once it is gone, interrupts the main thread.

    :param node: the node that this process has started itself; None for a cluster of others.
    """

    def __init__(self, node: Any | None) -> None:
        super().__init__(name="hfbatch-cluster", daemon=True)
        self.lost = ""
        """What is gone, in a sentence; empty while all is well."""
        self.leaving = False
        """Whether the work has ended already, so that nothing is left to interrupt."""
        self._node = node
        self._over = threading.Event()
        self._answered = time.monotonic()

    def run(self) -> None:
        """Until `stop`."""
        asked = 0.0
        while not self._over.wait(POLL_S):
            self.lost = self._dead()
            if not self.lost and time.monotonic() - asked >= PING_S:
                self.lost = self._ping()
                asked = time.monotonic()
            if self.lost:
                supervisor.interrupt(self.lost, self._over, lambda: self.leaving)
                return

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()

    def or_lost(self, error: BaseException) -> BaseException:
        """What ended the work: the loss of the cluster, where it is lost, else the error."""
        return WorkerError(self.lost) if self.lost else error

    def _dead(self) -> str:
        """A vital process of the own cluster that has died."""
        dead = [name for name, _ in self._node.dead_processes() if name in VITAL] if self._node else []
        return f"the Ray cluster of this job is gone: its process {dead[0]} has died" if dead else ""

    def _ping(self) -> str:
        client = getattr(ray._private.worker.global_worker, "gcs_client", None)
        if client is None:  # ray:// talks to a server of the cluster, and notices itself
            return ""
        try:
            client.internal_kv_exists(b"hfbatch", None, timeout=PING_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, there was no answer
            silent = time.monotonic() - self._answered
            if silent < SILENCE_S or self._over.is_set():
                return ""
            return f"the head of the Ray cluster has not answered for {silent:.0f} s: {error}"
        self._answered = time.monotonic()
        return ""


@contextmanager
def watched(node: Any | None = None) -> Iterator[Watch]:
    """Watches the cluster while the block runs.

    :raises WorkerError: if the cluster is lost meanwhile.
    """
    watch = Watch(node)
    supervisor.note(ENDED_BY_RAY)
    watch.start()
    try:
        yield watch
    except KeyboardInterrupt as error:
        raise watch.or_lost(error) from None
    finally:
        watch.stop()
