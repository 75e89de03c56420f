"""Describes a plan as plain values and as tables, for `hfbatch plan` and `--dry-run`."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal

from hfbatch.console.display import add, facts, show
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.reader import read_split
from hfbatch.errors import SplitError
from hfbatch.output.ledger import types_of
from hfbatch.pages.page import count, seconds_in_words
from hfbatch.predict.plan import Plan
from hfbatch.runtime.batching import by_length, cut
from hfbatch.runtime.prepare import POSITION, preprocess

SAMPLE_ROWS = 1024
SAMPLE_BATCH = 32
"""Batch size for the estimate of padding; the job's batch size is chosen on the device."""


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain values. Tokenises a sample of rows; starts nothing."""
    parameters, stored = plan.model.size()
    return {
        "task": plan.spec.task,
        "model": {
            "name": plan.model.name,
            "file": plan.model.file or None,
            "commit": plan.model.commit,
            "parameters": parameters,
            "bytes": stored,
            "dtype": plan.choice.dtype if plan.choice else plan.spec.model.dtype,
        },
        "endpoint": getattr(plan.spec.engine, "url", None),
        "input": {
            "path": plan.spec.input.path,
            "format": plan.source.format,
            "files": len(plan.source.files),
            "bytes": sum(file.size for file in plan.source.files),
            "rows": plan.rows,
            "filter": plan.spec.input.filter,
            "broken": {split.pieces[0].file: split.fault for split in plan.broken},
        },
        "output": {
            "path": plan.spec.output.path,
            "schema": types_of(plan.schema),
        },
        "splits": {
            "total": len(plan.splits),
            "done": len(plan.state.done),
            "todo": len(plan.todo),
            "stale": len(plan.state.stale),
        },
        "fingerprint": plan.fingerprint,
        "lengths": sample_lengths(plan),
        "notes": plan.notes,
    }


def sample_lengths(plan: Plan) -> dict[str, float] | None:
    """Returns token lengths of a sample, and the expected padding; None if no rows are left or they cannot be read."""
    if not plan.todo or plan.spec.engine.name == "http":  # the endpoint counts the tokens
        return None
    try:
        rows = read_split(plan.todo[0], plan.read)
    except SplitError:
        return None
    table, places = rows.table.slice(0, SAMPLE_ROWS), rows.places.slice(0, SAMPLE_ROWS)
    columns = arrays_of(table, plan.inputs)
    prepared = preprocess(plan.task, columns, places)
    if not len(prepared.features):
        return None
    lengths = plan.task.lengths(prepared.features.drop_columns([POSITION]))
    ordered = lengths[by_length(lengths)]
    padded = sum(int(ordered[start]) * (stop - start) for start, stop in cut(ordered, SAMPLE_BATCH))
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1])
    names = ("min", "median", "p90", "p99", "max")
    return {
        "rows": len(lengths),
        "mean": round(float(lengths.mean()), 1),
        **{name: int(value) for name, value in zip(names, quantiles, strict=True)},
        "truncated": int(prepared.cut.sum()),
        "padding": round(1 - float(lengths.sum()) / max(padded, 1), 4),
    }


def render_plan(plan: dict[str, Any], console: Console) -> None:
    """Prints the result of `describe_plan`, with `layout` and `trial` if they were added."""
    table = facts()
    model, source, splits = plan["model"], plan["input"], plan["splits"]
    add(table, "task", plan["task"])
    weights = (
        f"{model['parameters']:,} parameters, {decimal(model['bytes'])}"
        if model["parameters"]
        else model["file"] or (f"a graph, {decimal(model['bytes'])}" if model["bytes"] else "not fetched yet")
    )
    served = f"{model['name']}, served by {plan['endpoint']}"
    here = f"{model['name']} @ {model['commit'][:12]} ({weights}, dtype {model['dtype']})"
    add(table, "model", served if plan["endpoint"] else here)
    files = count(source["files"], f"{source['format']} file")
    add(table, "input", f"{source['path']} ({files}, {decimal(source['bytes'])})")
    add(
        table,
        "rows",
        f"{source['rows']:,}" + (f" before the filter {source['filter']!r}" if source["filter"] else ""),
    )
    add(table, "splits", f"{splits['done']:,} done, {splits['todo']:,} to do" + _stale(splits["stale"]))
    add(table, "output", plan["output"]["path"])
    add(table, "schema", ", ".join(f"{name}: {kind}" for name, kind in plan["output"]["schema"].items()))
    if plan["lengths"]:
        add(table, "tokens", _lengths(plan["lengths"]))
    if "layout" in plan:
        add(table, "workers", _layout(plan["layout"]))
    if "trial" in plan:
        add(table, "trial", _trial(plan["trial"]))
        for one in plan["trial"]["trials"] or ():
            add(table, "tried", _tried(one))
        if plan["trial"]["guard"]:
            add(table, "precision", plan["trial"]["guard"]["summary"])
    for note in plan["notes"]:
        add(table, "note", note)
    for file, fault in source["broken"].items():
        add(table, ("broken", "red"), f"{file}: {fault}")
    show(console, table)


def _stale(count: int) -> str:
    return f", {count:,} of an older input will be removed" if count else ""


def _lengths(lengths: dict[str, float]) -> str:
    cut_off = f", {lengths['truncated']:,} truncated" if lengths["truncated"] else ""
    return (
        f"median {lengths['median']}, p90 {lengths['p90']}, p99 {lengths['p99']}, max {lengths['max']} "
        f"in {lengths['rows']:,} rows{cut_off}; padding about {lengths['padding']:.1%}"
    )


def _layout(layout: dict[str, float]) -> str:
    gpus = f" and {layout['gpus']:g} GPU" if layout["gpus"] else ""
    return (
        f"{layout['workers']} × {layout['cpus']:g} CPUs{gpus}; "
        f"{layout['read_tasks']} reading, {layout['write_tasks']} writing tasks"
    )


def _tried(trial: dict[str, Any]) -> str:
    rate = f"{trial['rows_per_s']:,.0f} rows/s" if trial["rows_per_s"] else ""
    return f"{trial['variant']}: {'; '.join(filter(None, [rate, trial['note']]))}"


def _trial(trial: dict[str, Any]) -> str:
    weights = "" if trial["quantization"] == "none" else f"{trial['quantization']} in "
    weights = f"compiled, {weights}" if trial["compiled"] else weights
    return (
        f"{trial['rows_per_s']:,.0f} rows/s, {trial['tokens_per_s']:,.0f} tokens/s on one worker "
        f"({trial['device']}, {trial['engine']}, {weights}{trial['dtype']}, batch {trial['batch_size']}); "
        f"about {seconds_in_words(trial['eta_s'])} for {trial['rows_todo']:,} rows on all"
    )
