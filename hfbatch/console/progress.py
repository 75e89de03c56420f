"""Progress of a job on stderr: a live block on a terminal, plain lines elsewhere. Does not import Ray.

Rates are measured over the last half minute, so that the remaining time reflects the present rate and not the
start-up.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from hfbatch.console.display import add, line, say, screen

WINDOW = 30.0
"""Seconds over which rates are measured."""
SECONDS_BETWEEN_LINES = 10.0
"""Seconds between plain lines where there is no terminal."""
BAR = 72
"""Width of the bar in columns, if the terminal is wide enough."""
SLOW = 60.0
"""Seconds in one stage after which a split is reported as slow."""
LEAST_SECONDS = 1.0
"""Seconds to measure before a rate is shown."""


@dataclass
class Snapshot:
    """The state of a job at one moment."""

    splits_done: int = 0
    splits_failed: int = 0
    splits_total: int = 0
    rows_done: int = 0
    rows_total: int | None = None
    """Rows to process; None where a filter makes it unknown."""
    tokens: int = 0
    padded_tokens: int = 0
    rejected: int = 0
    elapsed: float = 0.0
    """Seconds since the command began; all times shown are on this clock."""
    working: float = 0.0
    """Seconds since the first batch; 0 until then."""
    state: str = ""
    """The current phase, such as `starting workers` or `running`."""
    reading: int = 0
    """Rows of the splits being read."""
    oldest: float = 0.0
    """Seconds that the oldest split has spent in its stage."""


@dataclass(frozen=True)
class Rates:
    """The present rates; None where a rate is not known yet."""

    rows: float | None = None
    """Rows per second."""
    tokens: float | None = None
    """Tokens per second."""
    left: float | None = None
    """Seconds remaining."""


class Pace:
    """Rates over a sliding window that begins with the first batch. :param window: its length in seconds."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._samples: deque[tuple[float, int, int]] = deque()
        self._before = Snapshot()

    def add(self, now: Snapshot) -> Rates:
        """Adds a snapshot; returns the rates."""
        if now.working <= 0:
            self._before = now
            self._samples.clear()
            return Rates()
        if not self._samples:
            self._samples.append((now.elapsed - now.working, self._before.rows_done, self._before.tokens))
        self._samples.append((now.elapsed, now.rows_done, now.tokens))
        while len(self._samples) > 2 and self._samples[1][0] <= now.elapsed - self._window:
            self._samples.popleft()
        then, rows, tokens = self._samples[0]
        seconds = now.elapsed - then
        if seconds < LEAST_SECONDS:
            return Rates()
        pace = max(now.rows_done - rows, 0) / seconds
        return Rates(pace, max(now.tokens - tokens, 0) / seconds, self._left(now, pace))

    def _left(self, now: Snapshot, pace: float) -> float | None:
        if now.rows_total is not None:
            return max(now.rows_total - now.rows_done, 0) / pace if pace > 0 else None
        through = now.splits_done - self._before.splits_done
        return (now.splits_total - now.splits_done) * now.working / through if through > 0 else None


class Progress:
    """Context manager that shows the progress of a job. May be updated from any thread.

    :param console: the console to write to; default: stderr, since stdout is for results.
    :param title: title of the job.
    :param quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, title: str = "", quiet: bool = False) -> None:
        self._console = console or screen(err=True)
        self._title = title
        self._quiet = quiet
        self._lock = threading.Lock()
        self._pace = Pace()
        self._now, self._rates = Snapshot(), Rates()
        self._printed: tuple[str, float] | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Starts the display."""
        if self._quiet:
            return self
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._block, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()
        elif self._title:
            self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shows the last state and ends the display."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif not self._quiet and self._printed is not None:
            self._print(status_line(self._now, self._rates, last=True))

    def update(self, snapshot: Snapshot) -> None:
        """Updates the state shown."""
        with self._lock:
            self._now, self._rates = snapshot, self._pace.add(snapshot)
            if self._quiet or self._console.is_terminal:
                return
            state, at = self._printed or (None, 0.0)
            if snapshot.state != state or snapshot.elapsed - at >= SECONDS_BETWEEN_LINES:
                self._printed = snapshot.state, snapshot.elapsed
                self._print(status_line(snapshot, self._rates))

    def _print(self, text: str) -> None:
        say(self._console, text, wrap=False)

    def _block(self) -> Table:
        """Builds the block for a terminal: title and state, bar, figures."""
        with self._lock:
            now, rates = self._now, self._rates
        gap = "  " if self._title else ""
        head = line((self._title, "bold"), gap, (now.state, "cyan"), f"  {duration(now.elapsed)}")
        if now.working <= 0:
            bar = ProgressBar(pulse=True, width=BAR)
        elif now.rows_total:
            bar = ProgressBar(now.rows_total, min(now.rows_done, now.rows_total), width=BAR)
        else:
            bar = ProgressBar(max(now.splits_total, 1), now.splits_done, width=BAR)
        figures = line(" · ".join(_figures(now, rates)))
        if now.rejected or now.splits_failed:
            figures.highlight_regex(r"[\d,]+ (rejects?|splits? failed)", "yellow")
        block = Table.grid()
        for row in (head, bar, figures):
            add(block, row)
        return block


def status_line(now: Snapshot, rates: Rates, last: bool = False) -> str:
    """Formats one line, such as `12,288/40,000 rows · 812 rows/s · 44k tokens/s · 3 rejects · 5/17 splits · eta 0:34`.

    :param last: the job is over: shows the time taken instead of the time left.
    """
    if last:
        figures = _figures(now, Rates(rates.rows, rates.tokens))
        return " · ".join([*figures, f"{duration(now.elapsed)} in all"])
    if now.working <= 0:
        return " · ".join([f"{now.state or 'starting'} · {duration(now.elapsed)}", *_slow(now)])
    head = [] if now.state in ("", "running") else [now.state]
    return " · ".join([*head, *_figures(now, rates)])


def _figures(now: Snapshot, rates: Rates) -> list[str]:
    total = f"/{now.rows_total:,}" if now.rows_total is not None else ""
    figures = [f"{now.rows_done:,}{total} rows"]
    if rates.rows is not None:
        figures.append(f"{compact(rates.rows)} rows/s")
    if rates.tokens:
        figures.append(f"{compact(rates.tokens)} tokens/s")
    figures.append(f"{now.rejected:,} reject{'s' * (now.rejected != 1)}")
    figures.append(f"{now.splits_done:,}/{now.splits_total:,} splits")
    if now.splits_failed:
        figures.append(f"{now.splits_failed:,} split{'s' * (now.splits_failed != 1)} failed")
    if rates.left is not None:
        figures.append(f"eta {duration(rates.left)}")
    return figures + _slow(now)


def _slow(now: Snapshot) -> list[str]:
    """Describes the work in progress, if one split takes unusually long."""
    if now.oldest < SLOW:
        return []
    reading = [f"{now.reading:,} rows being read"] if now.reading else []
    return [*reading, f"slowest split {duration(now.oldest)}"]


def compact(number: float) -> str:
    """Formats a number with about three digits: 0.25, 8.1, 812, 4,120, 44k, 1.2M."""
    if number >= 9_999.5:
        for unit in "kMGT":
            number /= 1000
            if number < 999.5 or unit == "T":
                return f"{number:.1f}{unit}" if number < 9.95 else f"{number:,.0f}{unit}"
    if number >= 99.5 or number == int(number):
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 0.95 else f"{number:.2g}"


def duration(seconds: float) -> str:
    """Formats seconds as a clock: 0:34, 12:05, 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
