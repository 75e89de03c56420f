"""Reads the status of a job from its output folder, without the input and without a cluster."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from hfbatch.console.display import add, facts, show
from hfbatch.errors import SpecError
from hfbatch.output import jobfile
from hfbatch.output.layout import REPORT
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import describe_holder
from hfbatch.output.sinks.parquet import ParquetSink
from hfbatch.pages.page import model_words


def is_training(out: str) -> bool:
    """Returns whether a folder is the output of a fine-tuning. :raises SpecError: if it is not an output of hfbatch."""
    return jobfile.is_training(jobfile.require_job(out))


def read_status(out: str) -> dict[str, Any]:
    """Returns parts, rows, rejects, and how the last run ended. :raises SpecError: if OUT is not an output."""
    ledger, job = _job(out)
    manifests = ParquetSink(ledger).manifests()
    last = _last_report(ledger)
    return {
        "output": ledger.out,
        "task": job["spec"]["task"],
        "model": job["model"],
        "fingerprint": job["fingerprint"],
        "settled": job["settled"],
        "success": ledger.has_success(),
        "running": describe_holder(ledger.fs, ledger.root),
        "parts": len(manifests),
        "splits": last["splits"]["total"] if last else None,
        "rows_in": sum(manifest.rows_in for manifest in manifests),
        "rows_out": sum(manifest.rows_out for manifest in manifests),
        "rows_rejected": sum(manifest.rows_rejected for manifest in manifests),
        "last_run": {key: last[key] for key in ("finished", "exit_code", "message")} if last else None,
    }


def read_report(out: str) -> dict[str, Any]:
    """Returns report.json of the last run. :raises SpecError: if there is none."""
    ledger, _ = _job(out)
    out = ledger.out
    report = _last_report(ledger)
    if report is None:
        raise SpecError(
            f"{out} has no report yet: its job was killed or still runs; see `hfbatch status {out}`"
        )
    return report


def render_status(status: dict[str, Any], console: Console) -> None:
    """Prints the result of `read_status`."""
    table = facts()
    add(table, "state", _state(status))
    add(table, "task", f"{status['task']} with {model_words(status['model'])}")
    if status["running"]:
        add(table, "running", holder_line(status["running"]))
    of = f" of {status['splits']:,}" if status["splits"] else ""
    add(table, "parts", f"{status['parts']:,}{of}")
    add(table, "rows", f"{status['rows_out']:,} out, {status['rows_rejected']:,} rejected")
    if status["settled"]:
        chosen = status["settled"]
        weights = "" if chosen.get("quantization", "none") == "none" else f"{chosen['quantization']} in "
        engine = chosen.get("engine", "torch")
        engine += ", compiled" if chosen.get("compiled") else ""
        shown = f"batch {chosen['batch_size']}, {engine}, {weights}{chosen['dtype']} on {chosen['device']}"
        add(table, "chosen", shown)
        if chosen.get("guard"):
            add(table, "precision", chosen["guard"]["summary"])
    if status["last_run"]:
        add(table, "last run", f"{status['last_run']['finished']}: {status['last_run']['message']}")
    show(console, table)


def holder_line(running: dict[str, Any]) -> str:
    """Formats the process that is writing to an output."""
    return (
        f"{running['user']}@{running['host']}, process {running['pid']}, since {running['since']}; last heartbeat "
        f"{running['heartbeat_seconds_ago']:.0f} s ago"
    )


def _state(status: dict[str, Any]) -> tuple[str, str]:
    last = status["last_run"] or {}
    if status["success"]:
        return "success", "green"
    if last.get("exit_code") == 3 and status["parts"] == status["splits"]:
        return "all rows are written, too many are rejected", "yellow"
    return "running" if status["running"] else "not finished: the same command resumes", ""


def _job(out: str) -> tuple[Ledger, dict[str, Any]]:
    return Ledger(out), jobfile.require_job(out)


def _last_report(ledger: Ledger) -> dict[str, Any] | None:
    data = jobfile.read_file(ledger.fs, ledger.root, REPORT)
    return None if data is None else json.loads(data)
