"""The page of a fine-tuning, from metrics.json alone. Touches no file but its template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfbatch import charts
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.report import render_page

MOST_CELLS = 20
"""Labels up to which the confusion matrix is drawn; beyond, the commonest confusions are listed."""
MOST_CONFUSIONS = 15
MOST_COUNTED = 12
"""Labels whose rows are drawn as bars."""


def render_report(metrics: Mapping[str, Any]) -> str:
    """The page. :param metrics: the content of metrics.json."""
    confusion = metrics["details"].get("confusion")
    return render_page(
        "finetune.html.j2",
        draw(metrics),
        m=metrics,
        table=figures(metrics),
        confusions=commonest(confusion) if confusion else [],
        spec=FinetuneSpec.model_validate(metrics["spec"]).to_yaml(),
    )


def figures(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each metric with what to compare it with: `name`, `baseline`, `before`, `best`, and `merged` (the model with
    its adapters merged into it); None where there is none.
    """
    names = [name for name in metrics["best"] if name != "step"]
    names.sort(key=lambda name: (name != metrics["metric"], name != "loss"))
    return [
        {
            "name": name,
            "baseline": metrics["baseline"].get(name),
            "before": metrics["before"].get(name),
            "best": metrics["best"][name],
            "merged": metrics.get("merged", {}).get(name),
        }
        for name in names
    ]


def commonest(confusion: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Truth, guess and rows of the commonest confusions of two labels, falling."""
    labels = confusion["labels"]
    found = [
        (labels[row], labels[column], count)
        for row, counts in enumerate(confusion["counts"])
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(found, key=lambda one: -one[2])[:MOST_CONFUSIONS]


def draw(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The charts as SVG; "" where there is nothing to draw."""
    metric, evaluations, losses = metrics["metric"], metrics["evaluations"], metrics["losses"]
    learnt = [(entry["step"], entry["loss"]) for entry in losses]
    measured = {
        name: [(entry["step"], entry[name]) for entry in evaluations if name in entry]
        for name in ("loss", metric)
    }
    base = metrics["baseline"].get(metric)
    rates = [(entry["step"], entry["learning_rate"]) for entry in losses if "learning_rate" in entry]
    confusion = metrics["details"].get("confusion") or {"labels": [], "counts": []}
    fits = len(confusion["labels"]) <= MOST_CELLS
    labels = dict(sorted(metrics["data"]["labels"].items(), key=lambda one: -one[1])[:MOST_COUNTED])
    padding = metrics["throughput"].get("padding")
    return {
        "loss": charts.lines(
            "loss", {"training": learnt, "evaluation": measured["loss"]}, "step", "Loss over steps"
        ),
        "metric": ""
        if metric == "loss"
        else charts.lines(
            "metric", {metric: measured[metric]}, "step", f"{metric} over steps",
            None if base is None else ("baseline", base),
        ),
        "rate": charts.lines("rate", {"learning rate": rates}, "step", "Learning rate over steps"),
        "confusion": charts.matrix("confusion", **confusion, title="Truth and guess") if fits else "",
        "labels": charts.bars(
            "labels", labels, [f"{count:,}" for count in labels.values()], "Rows of each label in training"
        ),
        "padding": ""
        if padding is None
        else charts.share(
            "padding", [("rows", 1 - padding), ("padding", padding)], "Computed: rows and padding"
        ),
    }  # fmt: skip
