"""Progress: a live block on a terminal, few plain lines elsewhere, and a time left that can be believed."""

import io
import threading

import pytest
from rich.console import Console

from hfbatch.console.progress import Pace, Progress, Rates, Snapshot, compact, duration, status_line


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def lines_of(console):
    return console.file.getvalue().splitlines()


def running(seconds, rows, **more):
    """Ten seconds of start-up, then work."""
    return Snapshot(
        rows_done=rows, rows_total=40_000, splits_total=17, tokens=rows * 54, elapsed=10.0 + seconds,
        working=seconds, state="running", **more,
    )  # fmt: skip


def test_a_line_shows_rows_rates_rejects_splits_and_the_time_left():
    now = Snapshot(5, 0, 17, 12_288, 40_000, 1, 1, 3, 20.0, 15.0, "running")
    line = status_line(now, Rates(812.0, 44_123.0, 34.1))
    assert line == "12,288/40,000 rows · 812 rows/s · 44k tokens/s · 3 rejects · 5/17 splits · eta 0:34"


def test_before_the_first_batch_a_line_says_what_is_happening():
    assert status_line(Snapshot(elapsed=4.2, state="starting workers"), Rates()) == "starting workers · 0:04"


def test_failed_splits_are_reported():
    assert "1 split failed" in status_line(running(9.0, 10, splits_failed=1), Rates())


def test_the_time_left_is_hidden_until_it_is_known():
    pace = Pace()
    assert pace.add(Snapshot(rows_total=100, elapsed=9.0)) == Rates()
    assert pace.add(running(0.5, 100)).left is None
    assert pace.add(running(2.0, 0)).left is None
    assert pace.add(running(4.0, 400)).left == pytest.approx((40_000 - 400) / 100)


def test_rates_leave_out_the_start_up_and_what_was_done_before():
    pace = Pace()
    pace.add(Snapshot(rows_done=8_000, rows_total=40_000, elapsed=9.0, state="starting workers"))
    rates = pace.add(running(10.0, 9_000))
    assert rates.rows == pytest.approx(100)


def test_rates_follow_the_last_half_minute():
    pace = Pace()
    for second in range(1, 61):
        pace.add(running(float(second), 1_000 * second))
    for second in range(61, 121):
        rates = pace.add(running(float(second), 60_000 + 10 * (second - 60)))
    assert rates.rows == pytest.approx(10)
    assert rates.tokens == pytest.approx(540)


def test_without_a_row_total_the_time_left_comes_from_splits():
    pace = Pace()
    pace.add(Snapshot(splits_done=2, splits_total=12, elapsed=5.0))
    rates = pace.add(Snapshot(splits_done=4, splits_total=12, rows_done=10, elapsed=15.0, working=10.0))
    assert rates.left == pytest.approx(40.0)


def test_without_a_terminal_a_line_comes_at_each_change_and_then_every_ten_seconds():
    out = console()
    with Progress(out, "embedding") as progress:
        for tenth in range(30):
            progress.update(Snapshot(elapsed=tenth / 10, state="connecting to Ray"))
        for second in range(1, 26):
            progress.update(running(float(second), 100 * second, splits_done=second // 9))
    title, connecting, *rest = lines_of(out)
    assert title == "embedding"
    assert connecting == "connecting to Ray · 0:00"
    assert len(rest) == 4
    assert rest[1].startswith(
        "1,100/40,000 rows · 100 rows/s · 5,400 tokens/s · 0 rejects · 1/17 splits · eta "
    )
    assert rest[-1].startswith("2,500/40,000 rows")
    assert rest[-1].endswith("0:35 in all")


def test_a_title_or_state_with_brackets_is_shown_as_it_is():
    out = console()
    with Progress(out, "model [bold]x[/bold]") as progress:
        progress.update(Snapshot(state="[red]"))
    assert lines_of(out)[:2] == ["model [bold]x[/bold]", "[red] · 0:00"]


def test_a_terminal_shows_title_state_bar_and_figures():
    out = console(terminal=True)
    with Progress(out, "embedding [x]") as progress:
        progress.update(Snapshot(state="starting workers"))
        progress.update(running(4.0, 400, rejected=2))
    shown = out.file.getvalue()
    for text in ("embedding [x]", "running", "━", "400/40,000 rows", "100 rows/s", "eta 6:36", "2 rejects"):
        assert text in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(terminal):
    out = console(terminal)
    with Progress(out, "embedding", quiet=True) as progress:
        progress.update(running(4.0, 400))
    assert out.file.getvalue() == ""


def test_results_have_stdout_to_themselves(capsys):
    with Progress(title="embedding") as progress:
        progress.update(running(4.0, 400))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "400/40,000 rows" in captured.err


def test_updates_may_come_from_many_threads():
    out = console()
    with Progress(out) as progress:
        threads = [
            threading.Thread(target=lambda: [progress.update(running(2.0, k)) for k in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines_of(out)) == 2


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.254, "0.25"), (8.12, "8.1"), (40.0, "40"), (99.6, "100"), (812.4, "812"), (4_120, "4,120"),
        (9_999.6, "10k"), (44_123, "44k"), (999_499, "999k"), (999_600, "1.0M"), (1.23e6, "1.2M"), (7e9, "7.0G"),
        (5e15, "5,000T"),
    ],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert compact(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (34.4, "0:34"), (59.6, "1:00"), (725, "12:05"), (11_045, "3:04:05")]
)
def test_durations_read_as_a_clock(seconds, text):
    assert duration(seconds) == text
