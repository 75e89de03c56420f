"""Progress of a training: a bar on a terminal, plain lines elsewhere, the better metric kept."""

from __future__ import annotations

import io

from rich.console import Console

from hfbatch.train.progress import TrainProgress


def shown(terminal: bool, metric: str = "accuracy", quiet: bool = False) -> str:
    """What is written while a training takes two of four steps and is measured three times."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with TrainProgress(console, "text-classification with org/model, full", quiet) as progress:
        progress.say("validating the rows")
        progress.measure(metric, 32)
        progress.show({"step": 0, "steps": 4, "eval_accuracy": 0.25, "eval_loss": 1.5})
        progress.show({"step": 1, "steps": 4, "loss": 0.75})
        progress.show({"step": 1, "steps": 4, "eval_accuracy": 0.875, "eval_loss": 0.5})
        progress.show({"step": 2, "steps": 4})
        progress.show({"step": 2, "steps": 4, "eval_accuracy": 0.5, "eval_loss": 0.625})
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_lines_show_phases_and_every_evaluation() -> None:
    lines = shown(False).splitlines()
    assert lines[0] == "validating the rows"
    assert "step 1 measured: accuracy 0.875 · loss 0.5" in lines
    assert not any("\x1b" in line for line in lines)


def test_a_bar_shows_steps_loss_the_best_rate_and_time_left() -> None:
    text = shown(True)
    for part in ("2/4", "loss 0.75", "best accuracy 0.875", "rows/s", "eta 0:00", "full"):
        assert part in text
    assert "best accuracy 0.5" not in text


def test_of_a_loss_the_lower_is_the_better() -> None:
    assert "best loss 0.5 " in shown(True, "loss")
    assert "best loss 0.625" not in shown(True, "loss")


def test_quiet_says_nothing() -> None:
    assert shown(False, quiet=True) == ""
    assert shown(True, quiet=True) == ""
