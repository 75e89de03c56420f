"""Detects a lost cluster and ends the work with a message, before Ray ends the process without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from hfbatch.console import supervisor
from hfbatch.errors import WorkerError

POLL_S = 1.0
PING_S = 5.0
PING_TIMEOUT_S = 10.0
SILENCE_S = 40.0
"""Seconds that the cluster's head may fail to answer: a restarted head is back within this time."""
VITAL = ("gcs_server", "raylet")
"""The processes without which a cluster on this machine does not work."""
ENDED_BY_RAY = (
    "Ray's library ended the process, as it does without a message when the cluster's head or this machine's raylet is "
    "gone"
)


class Watch(threading.Thread):
    """Thread that pings the cluster's head every few seconds and interrupts the main thread when it is gone.

    :param node: the node that this process started; None for a cluster that it did not start.
    """

    def __init__(self, node: Any | None) -> None:
        super().__init__(name="hfbatch-cluster", daemon=True)
        self.lost = ""
        """A sentence that says what is gone; empty while the cluster works."""
        self.leaving = False
        """Whether the work has already ended, so that no interrupt is needed."""
        self._node = node
        self._over = threading.Event()
        self._answered = time.monotonic()

    def run(self) -> None:
        """Watches the cluster until `stop`."""
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

    @property
    def own(self) -> bool:
        """Whether this process has started the cluster, and will end it."""
        return self._node is not None

    def or_lost(self, error: BaseException) -> BaseException:
        """Returns what ended the work: the loss of the cluster if it is lost, else the error."""
        return WorkerError(self.lost) if self.lost else error

    def _dead(self) -> str:
        """Returns a message if a vital process of the cluster started here has died; else an empty text."""
        dead = [name for name, _ in self._node.dead_processes() if name in VITAL] if self._node else []
        return f"the Ray cluster of this job is gone: its process {dead[0]} has died" if dead else ""

    def _ping(self) -> str:
        client = getattr(ray._private.worker.global_worker, "gcs_client", None)
        if client is None:  # ray:// connects to a server of the cluster and detects its loss itself
            return ""
        try:
            client.internal_kv_exists(b"hfbatch", None, timeout=PING_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - any error means that there was no answer
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
