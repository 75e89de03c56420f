"""Signs of life from within long work: the process lives, whatever takes it so long. Knows nothing of splits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_S = 10.0


@contextmanager
def beating(beat: Callable[[], object], seconds: float = BEAT_S) -> Iterator[None]:
    """Calls `beat` from another thread every few seconds while the block runs; stops where it raises."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            try:
                beat()
            except Exception:  # noqa: BLE001 - nobody listens any more: the work itself will notice
                return

    threading.Thread(target=run, name="hfbatch-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        over.set()
