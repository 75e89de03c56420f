"""Progress of a training on stderr: a line that is drawn anew on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_LINES = 15


class TrainProgress:
    """Says what a training does. :param quiet: say nothing."""

    def __init__(self, console: Console | None, title: str, quiet: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._title, self._quiet = title, quiet
        self._live: Live | None = None
        self._begun: tuple[float, int] | None = None
        self._told = 0.0
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A phase."""
        self._draw(text, always=True)

    def show(self, news: dict[str, Any]) -> None:
        """A step, a loss or metrics."""
        self._known |= news
        step, steps = self._known.get("step", 0), self._known.get("steps", 0)
        measured = {name[5:]: value for name, value in news.items() if name.startswith("eval_")}
        if measured:
            figures = " · ".join(f"{name} {value:.4g}" for name, value in measured.items())
            return self._draw(f"step {step:,} measured: {figures}", always=True)
        if self._begun is None:
            self._begun = time.monotonic(), step
        parts = [f"step {step:,}/{steps:,}"]
        if "loss" in self._known:
            parts.append(f"loss {self._known['loss']:.4g}")
        since, first = self._begun
        if step > first:
            left = int((time.monotonic() - since) / (step - first) * (steps - step))
            parts.append(f"eta {left // 60}:{left % 60:02d}")
        return self._draw(" · ".join(parts))

    def _draw(self, text: str, always: bool = False) -> None:
        if self._quiet:
            return
        if self._live:
            if always:
                self._console.print(text, highlight=False)
            self._live.update(Text(f"{self._title}: {text}"))
        elif always or time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._console.print(text, highlight=False)
