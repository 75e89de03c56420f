"""The report of a job: its numbers, its HTML page, its table for a terminal. Writes no files.

Everything is computed from job.json, the manifests of the splits and the driver's clock. Does not import Ray.

Keys of report.json:

- `rows`: `read` (before the filter), `in` (after it), `out`, `rejected`, `truncated`, `repeated`, `filtered`
- `splits`: `total`, `done`, `failed`, `left` (neither done nor failed), `this_run` (done by this run)
- `tokens`, `padded_tokens` (what the device computed), `padding` (share of padded_tokens that is padding;
  None without tokens)
- `seconds`: `total`, `start_up` (until the first batch), `working` (from then on), `first_part` (from the
  command to the first commit, None without one), `phases` (the driver's, in order)
- `rates`: `rows_per_s` and `tokens_per_s` while working, `rows_per_s_with_start_up`; None if nothing ran.
  Rows are input rows, rejects included
- `stages`: busy seconds of each, summed over all workers
- `left_out`: files in the input's folder that are not read, one line for each reason
- `rejects`: `max_fraction` allowed, `fraction` of `rows.in`, `reasons` (`stage: error type` to rows)
- `unplanned`: columns of JSONL that the plan did not see and that are in no part, to rows that have them
- `failed`: `part` and `error` of each failed split
- `model`, `batch_size`, `engine`, `compiled`, `dtype`, `quantization`, `devices` (the distinct workers), `versions`,
  `spec`, `fingerprint`
- `guard`: the comparison of a lowered precision with float32: `status`, `summary`, `rows`, `measures`, `limits`,
  `differences` (rows by 1 less their agreement, with `edges`); None if nothing is lowered
- `usage`: `requests`, `prompt_tokens` and `new_tokens` that an endpoint was asked for and counted, and `cost` by the prices
  in the spec (None without prices); {} for other engines. Requests of splits that failed are not in it
- `cached_tokens`: tokens of prompts that were not computed again, since other prompts begin with them
- `trials`: `variant`, `rows_per_s` and `note` of each that `engine: auto` tried; None if it tried nothing
- `timeline`: cumulative `rows` and `tokens` at `seconds` since the command began, for each commit
- `lengths`: `edges` and `counts` of tokens per row; `histogram`: those of the task's number, and its `name`
- `finished`: ISO time, UTC
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from hfbatch.console import display
from hfbatch.console.progress import compact
from hfbatch.errors import HfbatchError
from hfbatch.output.layout import REJECTS, REPORT, REPORT_PAGE
from hfbatch.output.manifest import LENGTH_EDGES, Manifest, unplanned_columns
from hfbatch.pages import charts
from hfbatch.pages.page import count, model_words, percent, rate, render_page, seconds_in_words

PHASES = {
    "plan": "plan: check everything, make the splits",
    "connect": "connect to Ray, or start it",
    "workers": "start workers, load the model",
    "calibrate": "choose precision and batch size",
}
"""Phases of the start-up, in order: name in `seconds.phases`, and description."""
STAGES = ("read", "preprocess", "forward", "postprocess", "write")
MOST_POINTS = 500
"""Maximum points of the timeline; of more commits, evenly spaced ones are shown."""
MOST_LISTED = 50
"""Maximum number of failed splits, reasons and workers that the page lists; report.json has all of them."""
MOST_BARS = 8
STATUS = {0: "success", 1: "failed", 3: "rejects", 130: "interrupted"}
"""Status by exit code of the run."""


def build_report(
    job: Mapping[str, Any],
    manifests: Sequence[Manifest],
    run_parts: set[str],
    timing: Mapping[str, float],
    histogram: Mapping[str, Any] | None,
    *,
    splits_total: int | None = None,
    ended: float | None = None,
) -> dict[str, Any]:
    """Computes the content of report.json, see above. Rates and timeline are of this run, all else of the whole output.

    :param job: job.json.
    :param manifests: those of all committed parts, and of the splits that failed (`error` set).
    :param run_parts: the parts that this run committed.
    :param timing: seconds of the driver's phases, in order: those of PHASES that took place and `working`; also
        `first_part` and `total`, which count from the command's start.
    :param histogram: `name` and `edges` of the task's histogram.
    :param splits_total: splits of the plan; default: those that have a manifest.
    :param ended: unix time when the run ended, default now; with `total`, it gives the start for the timeline.
    :raises HfbatchError: if a committed part has lost or added rows.
    """
    ended = time.time() if ended is None else ended
    failed = {manifest.part: manifest.error for manifest in manifests if manifest.error is not None}
    done = [manifest for manifest in manifests if manifest.error is None]
    ran = [manifest for manifest in done if manifest.part in run_parts]
    _check_conservation(done)
    rows, tokens, padded = _rows(done), _sum(done, "tokens"), _sum(done, "padded_tokens")
    seconds = _seconds(timing, bool(ran))
    total = len(done) + len(failed) if splits_total is None else splits_total
    edges = histogram["edges"] if histogram else []
    return {
        "rows": rows,
        "splits": {
            "total": total,
            "done": len(done),
            "failed": len(failed),
            "left": max(total - len(done) - len(failed), 0),
            "this_run": len(ran),
        },
        "tokens": tokens,
        "padded_tokens": padded,
        "padding": 1 - tokens / padded if padded else None,
        "seconds": seconds,
        "rates": _rates(ran, seconds),
        "stages": _stages(done),
        "cached_tokens": sum(manifest.usage.get("cached_tokens", 0) for manifest in done),
        "usage": _usage(done, job["spec"].get("engine", {})),
        "left_out": list(job.get("left_out", ())),
        "rejects": _rejects(job, done, rows),
        "unplanned": unplanned_columns(done),
        "failed": [{"part": part, "error": error} for part, error in sorted(failed.items())],
        "model": dict(job["model"]),
        **_choices(job.get("settled") or {}),
        "devices": sorted({manifest.worker for manifest in done if manifest.worker}),
        "timeline": _timeline(ran, ended - seconds["total"], seconds["total"]),
        "lengths": {
            "edges": list(LENGTH_EDGES),
            "counts": _bins((m.lengths for m in done), len(LENGTH_EDGES) - 1),
        },
        "histogram": {
            "name": histogram["name"] if histogram else "",
            "edges": list(edges),
            "counts": _bins((m.histogram for m in done), max(len(edges) - 1, 0)),
        },
        "versions": dict(job["versions"]),
        "spec": dict(job["spec"]),
        "fingerprint": job["fingerprint"],
        "finished": datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds"),
    }


def _usage(done: Iterable[Manifest], engine: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an endpoint was asked for; empty for other engines."""
    counts: Counter[str] = Counter()
    for manifest in done:
        counts.update(manifest.usage)
    if "requests" not in counts:
        return {}
    names, prices = ("requests", "prompt_tokens", "new_tokens"), engine.get("prices") or {}
    known = {name: counts[name] for name in names}
    cost = known["prompt_tokens"] * prices.get("input", 0) + known["new_tokens"] * prices.get("output", 0)
    return {**known, "cost": cost / 1e6 if any(prices.values()) else None}


def usage_words(usage: Mapping[str, Any]) -> str:
    """Returns what an endpoint was asked for in words."""
    words = f"{count(usage['requests'], 'request')}, {usage['prompt_tokens']:,} tokens in, {usage['new_tokens']:,} out"
    return words if usage["cost"] is None else f"{words}, cost {usage['cost']:,.2f}"


def _choices(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the first worker chose, and all others keep to."""
    return {
        "engine": choice.get("engine", "torch"),
        "compiled": choice.get("compiled", False),
        "dtype": choice.get("dtype"),
        "quantization": choice.get("quantization", "none"),
        "guard": choice.get("guard"),
        "trials": choice.get("trials"),
        "batch_size": choice.get("batch_size"),
    }


def _check_conservation(done: Iterable[Manifest]) -> None:
    for manifest in done:
        if manifest.rows_in != manifest.rows_out + manifest.rows_rejected:
            raise HfbatchError(
                f"part {manifest.part}: {manifest.rows_in} rows came in, but {manifest.rows_out} went out and "
                f"{manifest.rows_rejected} were rejected; delete that part and run the same command again"
            )


def _sum(manifests: Iterable[Manifest], name: str) -> int:
    return sum(getattr(manifest, name) for manifest in manifests)


def _rows(done: Sequence[Manifest]) -> dict[str, int]:
    names = {"read": "rows_read", "in": "rows_in", "out": "rows_out"}
    names |= {"rejected": "rows_rejected", "truncated": "rows_truncated", "repeated": "rows_repeated"}
    rows = {key: _sum(done, name) for key, name in names.items()}
    return {**rows, "filtered": rows["read"] - rows["in"]}


def _seconds(timing: Mapping[str, float], ran: bool) -> dict[str, Any]:
    total = timing.get("total", sum(seconds for name, seconds in timing.items() if name != "first_part"))
    start_up = min(sum(timing.get(name, 0.0) for name in PHASES), total)
    working = timing.get("working", total - start_up) if ran else 0.0
    phases = {name: seconds for name, seconds in timing.items() if name not in ("total", "first_part")}
    first = timing.get("first_part")
    return {"total": total, "start_up": start_up, "working": working, "first_part": first, "phases": phases}


def _rates(ran: Sequence[Manifest], seconds: Mapping[str, Any]) -> dict[str, float | None]:
    rows, tokens, working, total = (
        _sum(ran, "rows_in"),
        _sum(ran, "tokens"),
        seconds["working"],
        seconds["total"],
    )
    return {
        "rows_per_s": rows / working if ran and working > 0 else None,
        "tokens_per_s": tokens / working if ran and working > 0 else None,
        "rows_per_s_with_start_up": rows / total if ran and total > 0 else None,
    }


def _stages(done: Iterable[Manifest]) -> dict[str, float]:
    busy: defaultdict[str, float] = defaultdict(float)
    for manifest in done:
        for name, seconds in manifest.seconds.items():
            busy[name] += seconds
    order = [*STAGES, *sorted(set(busy) - set(STAGES))]
    return {name: busy[name] for name in order if name in busy}


def _rejects(job: Mapping[str, Any], done: Iterable[Manifest], rows: Mapping[str, int]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for manifest in done:
        if manifest.reasons:
            reasons.update(manifest.reasons)
    return {
        "max_fraction": job["spec"]["rejects"]["max_fraction"],
        "fraction": rows["rejected"] / rows["in"] if rows["in"] else 0.0,
        "reasons": dict(reasons.most_common()),
    }


def _timeline(ran: Sequence[Manifest], started: float, total: float) -> list[dict[str, float]]:
    if not ran:
        return []
    order = np.argsort([manifest.finished for manifest in ran], kind="stable")
    # Clocks of other machines may differ, so commits are clipped to the run.
    moments = np.clip(np.array([manifest.finished for manifest in ran])[order] - started, 0.0, total)
    rows = np.cumsum(np.array([manifest.rows_in for manifest in ran], np.int64)[order])
    tokens = np.cumsum(np.array([manifest.tokens for manifest in ran], np.int64)[order])
    chosen = np.unique(np.linspace(0, len(ran) - 1, min(len(ran), MOST_POINTS)).round().astype(int))
    return [
        {"seconds": round(float(moments[k]), 3), "rows": int(rows[k]), "tokens": int(tokens[k])}
        for k in chosen
    ]


def _bins(counts: Iterable[list[int]], bins: int) -> list[int]:
    known = [row for row in counts if bins and len(row) == bins]
    return np.array(known, np.int64).sum(axis=0).tolist() if known else [0] * bins


def status_of(report: Mapping[str, Any]) -> str:
    """Returns the status of the job: success, failed, rejects or interrupted; by `exit_code` if the report has one."""
    if "exit_code" in report:
        return STATUS.get(report["exit_code"], "failed")
    if report["splits"]["failed"]:
        return "failed"
    if report["splits"]["left"]:
        return "interrupted"
    over = report["rejects"]["fraction"] > report["rejects"]["max_fraction"]
    return "rejects" if over else "success"


def headline(report: Mapping[str, Any]) -> str:
    """Returns the status of the job in a sentence."""
    rows, splits, rejects = report["rows"], report["splits"], report["rejects"]
    committed = f"{splits['done']:,} of {count(splits['total'], 'split')} committed"
    match status_of(report):
        case "success" if not rows["in"]:
            return "Done: the input has no rows"
        case "success":
            left_out = f", {rows['rejected']:,} rejected" if rows["rejected"] else ", none rejected"
            return f"Done: {count(rows['out'], 'row')} predicted{left_out}"
        case "rejects":
            shares = percent(rejects["fraction"]), percent(rejects["max_fraction"])
            return f"Too many rejects: {shares[0]} of the rows, where up to {shares[1]} are allowed"
        case "interrupted":
            return f"Interrupted: {committed}"
        case _ if splits["failed"]:
            return f"{count(splits['failed'], 'split')} failed: {committed}"
        case _:
            return f"Stopped: {committed}"


def draw(report: Mapping[str, Any]) -> dict[str, str]:
    """Draws the charts of a report as SVG; "" for those without data."""
    seconds, reasons = report["seconds"], dict(list(report["rejects"]["reasons"].items())[:MOST_BARS])
    clock = {words: seconds["phases"][name] for name, words in PHASES.items() if name in seconds["phases"]}
    if seconds["working"]:
        clock["process the splits"] = seconds["working"]
    rest = seconds["total"] - sum(clock.values())
    if clock and rest >= 0.05:
        clock["verify and report"] = rest
    stages, histogram = report["stages"], report["histogram"]
    guard = report.get("guard") or {}
    padding = [("text", report["tokens"]), ("padding", report["padded_tokens"] - report["tokens"])]
    return {
        "throughput": charts.throughput(
            report["timeline"], seconds["start_up"], report["rates"]["rows_per_s"]
        ),
        "lengths": charts.histogram("lengths", **report["lengths"], xlabel="tokens in a row"),
        "padding": charts.share("padding", padding, "Tokens computed: text and padding"),
        "stages": charts.bars(
            "stages", stages, [seconds_in_words(busy) for busy in stages.values()], "Busy time of each stage"
        ),
        "clock": charts.bars(
            "clock", clock, [seconds_in_words(t) for t in clock.values()], "Time of each phase"
        ),
        "rejects": charts.bars(
            "rejects", reasons, [f"{number:,}" for number in reasons.values()], "Rejects by reason", warn=True
        ),
        "histogram": charts.histogram(
            "histogram", histogram["edges"], histogram["counts"], histogram["name"]
        ),
        "guard": charts.histogram("guard", guard["edges"], guard["differences"], f"1 less {guard['row']}")
        if guard.get("differences")
        else "",
    }


def render_html(report: Mapping[str, Any]) -> str:
    """Renders the report as a page."""
    return render_page(
        "report.html.j2",
        draw(report),
        report=report,
        status=status_of(report),
        headline=headline(report),
        usage=usage_words(report["usage"]) if report.get("usage") else "",
        spec=yaml.safe_dump(dict(report["spec"]), sort_keys=False, allow_unicode=True),
        most=MOST_LISTED,
        rejects_folder=REJECTS,
    )


def render_files(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns report.json and report.html by their names in an output."""
    return {
        REPORT: json.dumps(report, indent=1).encode(),
        REPORT_PAGE: render_html(report).encode("utf8", "replace"),
    }


def summary_lines(report: Mapping[str, Any]) -> Table:
    """Renders the report as a small table for a terminal."""
    rows, splits, seconds, rates = report["rows"], report["splits"], report["seconds"], report["rates"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, text: str) -> None:
        display.add(table, name, text)

    notes = [f"{rows[key]:,} {key}" for key in ("rejected", "truncated", "repeated", "filtered") if rows[key]]
    add("rows", ", ".join([f"{rows['out']:,} out of {rows['in']:,}", *notes]))
    for reason, number in list(report["rejects"]["reasons"].items())[:5]:
        add("", f"{number:,} × {reason}")
    for line in report.get("left_out", ()):
        add("left out", line)
    failed = [f"{splits['failed']:,} failed"] if splits["failed"] else []
    left = [f"{splits['left']:,} left"] if splits["left"] else []
    now = f"{splits['done']:,} of {splits['total']:,} ({splits['this_run']:,} in this run)"
    add("splits", ", ".join([now, *failed, *left]))
    if rates["rows_per_s"] is not None:
        whole = f"{rate(rates['rows_per_s_with_start_up'])} with start-up"
        add("rate", f"{rate(rates['rows_per_s'])} rows/s, {rate(rates['tokens_per_s'])} tokens/s ({whole})")
    add(
        "time",
        f"{seconds_in_words(seconds['total'])}, {seconds_in_words(seconds['start_up'])} of them start-up",
    )
    if report["padding"] is not None:
        add("padding", f"{percent(report['padding'])} of {compact(report['padded_tokens'])} tokens")
    if report.get("cached_tokens"):
        add("cached", f"{compact(report['cached_tokens'])} tokens that several prompts begin with")
    device = ", ".join(report["devices"][:3]) + (" …" if len(report["devices"]) > 3 else "")
    add("model", ", ".join(filter(None, [model_words(report["model"]), report["dtype"], device])))
    if report.get("usage"):
        add("endpoint", usage_words(report["usage"]))
    if report.get("guard"):
        add("precision", report["guard"]["summary"])
    return table
