"""Shows the progress of a training on stderr: a bar on a terminal, else periodic lines. Does not import Ray."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from hfbatch.console.display import line, say, screen
from hfbatch.console.progress import compact, duration
from hfbatch.train.recipes.base import LOWER_IS_BETTER

SECONDS_BETWEEN_LINES = 15


class FieldColumn(ProgressColumn):
    """Column of rich's progress bar that shows a field of a task, or its description."""

    def __init__(self, name: str, style: str = "") -> None:
        super().__init__()
        self._name, self._style = name, style

    def render(self, task: Task) -> Text:
        """Returns the current text."""
        text = task.description if self._name == "description" else task.fields[self._name]
        return line((text, self._style))


class TrainProgress:
    """Shows the progress of a training. Thread-safe.

    :param title: title of the training.
    :param quiet: show nothing.
    """

    def __init__(self, console: Console | None, title: str, quiet: bool = False) -> None:
        self._console = console or screen(err=True)
        self._title, self._quiet = title, quiet
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._metric, self._rows = "loss", 0
        self._begun: tuple[float, int] | None = None
        self._shown = 0.0
        self._known: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            columns = (
                FieldColumn("title", "bold"), FieldColumn("description", "cyan"),
                BarColumn(), MofNCompleteColumn(), FieldColumn("figures"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task("", total=None, title=self._title, figures="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def measure(self, metric: str, rows: int) -> None:
        """Sets what is shown. :param metric: the one that selects the best model. :param rows: rows of a step."""
        self._metric, self._rows = metric, rows

    def say(self, text: str) -> None:
        """Shows a phase."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=text)
        else:
            self._line(text, always=True)

    def show(self, news: dict[str, Any]) -> None:
        """Shows a step, a loss or metrics."""
        with self._lock:
            self._known |= {name: value for name, value in news.items() if name in ("step", "steps", "loss")}
            measured = {name[5:]: value for name, value in news.items() if name.startswith("eval_")}
            self._begun = self._begun or (time.monotonic(), self._known.get("step", 0))
            if self._metric in measured:
                self._take(measured[self._metric])
            step, steps = self._known.get("step", 0), self._known.get("steps", 0)
            figures = " · ".join(self._figures(step, steps))
            if measured:
                shown = " · ".join(f"{name} {value:.4g}" for name, value in measured.items())
                self._line(f"step {step:,} measured: {shown}", always=True)
            if self._bar:
                self._bar.update(
                    self._bar.task_ids[0],
                    description="training",
                    total=steps,
                    completed=step,
                    figures=figures,
                )
            elif not measured:
                self._line(f"step {step:,}/{steps:,} · {figures}")

    def _take(self, value: float) -> None:
        """Keeps the best value of the metric."""
        best = self._known.get("best")
        choose = min if self._metric in LOWER_IS_BETTER else max
        self._known["best"] = value if best is None else choose(best, value)

    def _figures(self, step: int, steps: int) -> list[str]:
        figures = [f"loss {self._known['loss']:.4g}"] if "loss" in self._known else []
        if "best" in self._known:
            figures.append(f"best {self._metric} {self._known['best']:.4g}")
        since, first = self._begun or (time.monotonic(), step)
        if step > first:
            each = (time.monotonic() - since) / (step - first)
            figures += [f"{compact(self._rows / max(each, 1e-9))} rows/s"] if self._rows else []
            figures.append(f"eta {duration(each * (steps - step))}")
        return figures

    def _line(self, text: str, always: bool = False) -> None:
        if not self._quiet and (always or time.monotonic() - self._shown > SECONDS_BETWEEN_LINES):
            self._shown = time.monotonic()
            say(self._console, text)
