"""Heartbeats from a thread during long work, which show that the process is alive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_S = 10.0


@contextmanager
def beating(beat: Callable[[], object], seconds: float = BEAT_S) -> Iterator[None]:
    """Calls `beat` from another thread every few seconds while the block runs; stops when `beat` raises."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            try:
                beat()
            except Exception:  # noqa: BLE001 - the receiver is gone; the work itself will fail
                return

    threading.Thread(target=run, name="hfbatch-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        over.set()
