"""Tables of a fine-tuning job for `hfbatch plan`, `status` and `report`: its estimate, state and metrics."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.filesize import decimal

from hfbatch.console.display import add as _add
from hfbatch.console.display import facts, say, show
from hfbatch.console.display import table as _headed
from hfbatch.pages.page import count, percent, seconds_in_words
from hfbatch.pages.training import figures
from hfbatch.predict.status import holder_line

MOST_LABELS = 8


def render_estimate(shown: dict[str, Any], console: Console) -> None:
    """Prints the result of `describe_training`."""
    table = facts()
    rows, batch, memory = shown["rows"], shown["batch"], shown["memory"]
    _add(table, "task", f"{shown['task']}, {shown['method']}, best by {shown['metric']}")
    share = shown["trainable"] / max(shown["weights"], 1)
    name, commit = shown["model"]["name"], shown["model"]["commit"][:12]
    _add(table, "model", f"{name} @ {commit}")
    _add(table, "weights", f"{shown['trainable']:,} trained of {shown['weights']:,} ({percent(share)})")
    _add(table, "rows", ", ".join(_rows(one, rows[one]) for one in ("train", "eval")))
    if shown["labels"]:
        _add(table, "labels", _labels(shown["labels"]))
    _add(table, "tokens", _lengths(shown["lengths"]))
    cut = f"{batch['size']} rows a step: {batch['workers']} × {batch['accumulation']} × {batch['per_device']}"
    _add(table, "steps", f"{shown['steps']:,} ({shown['epochs']:g} epochs), {cut}")
    _add(table, "memory", _memory(memory, shown["memory_dtype"], batch["per_device"]))
    if "trial" in shown:
        _add(table, "trial", _trial(shown["trial"]))
        eta = seconds_in_words(shown["trial"]["eta_s"])
        times = count(shown["trial"]["evaluations"], "evaluation")
        _add(table, "time", f"about {eta} with {times}, after the processes have started")
    _add(table, "output", shown["output"] + (" (finished already)" if shown["finished"] else ""))
    for note in shown["notes"]:
        _add(table, "note", note)
    show(console, table)


def render_state(status: dict[str, Any], console: Console) -> None:
    """Prints the result of `read_training`."""
    table = facts()
    running = status["running"]
    unfinished = "running" if running else "not finished: the same command resumes it"
    _add(table, "state", "success" if status["success"] else unfinished)
    _add(table, "task", f"{status['task']}, {status['method']}, with {status['model']}")
    if running:
        _add(table, "running", holder_line(running))
    steps = f" of {status['steps']:,}" if status["steps"] else ""
    _add(table, "saved", f"step {status['step']:,}{steps}" if status["step"] else "no checkpoint yet")
    if status["best"]:
        _add(table, "best", _named(status["best"]))
    show(console, table)


def render_figures(metrics: dict[str, Any], console: Console) -> None:
    """Prints the metrics of metrics.json."""
    columns = ["baseline", "before", "best", *(["merged"] if "merged" in metrics else [])]
    table = _headed("metric", *columns, box=None)
    for one in figures(metrics):
        _add(table, one["name"], *("–" if one[key] is None else f"{one[key]:.4g}" for key in columns))
    show(console, table)
    resumed = f", resumed at step {metrics['resumed_at']:,}" if metrics["resumed_at"] else ""
    time = seconds_in_words(metrics["seconds"])
    say(console, f"best at step {metrics['best']['step']:,}{resumed}, took {time}")
    for note in metrics.get("notes", ()):
        say(console, note)


def _rows(name: str, rows: dict[str, Any]) -> str:
    return f"{'' if rows['exact'] else 'about '}{rows['rows']:,} {name}"


def _labels(labels: dict[str, int]) -> str:
    ordered = sorted(labels.items(), key=lambda one: -one[1])
    shown = ", ".join(f"{name} {rows:,}" for name, rows in ordered[:MOST_LABELS])
    return shown + (f", … ({len(labels):,} in all)" if len(labels) > MOST_LABELS else "")


def _lengths(lengths: dict[str, Any]) -> str:
    cut = f", {percent(lengths['truncated'])} truncated" if lengths["truncated"] else ", none truncated"
    return (
        f"p50 {lengths['p50']}, p95 {lengths['p95']}, max {lengths['max']} in {lengths['rows']:,} rows{cut}"
    )


def _memory(memory: dict[str, Any], dtype: str, per_device: int) -> str:
    names = ("weights", "gradients", "optimizer", "activations")
    parts = " + ".join(
        f"{name} {decimal(memory[name]) if memory[name] is not None else 'unknown without a trial'}"
        for name in names
    )
    total = "" if memory["total"] is None else f"about {decimal(memory['total'])}: "
    how = f"activations are what one pass of {count(per_device, 'row')} of the longest in the sample keeps, {dtype}"
    return f"{total}{parts} ({how}; an estimate of one process's device, buffers and fragments aside)"


def _trial(trial: dict[str, Any]) -> str:
    return (
        f"{trial['rows_per_s']:,.0f} rows/s, {trial['tokens_per_s']:,.0f} tokens/s on one worker ({trial['device']}, "
        f"{trial['dtype']}), {seconds_in_words(trial['seconds_per_step'])} a step; "
        f"evaluates {trial['eval_rows_per_s']:,.0f} rows/s"
    )


def _named(values: dict[str, Any]) -> str:
    return " · ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
