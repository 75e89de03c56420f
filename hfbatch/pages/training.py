"""The HTML report of a fine-tuning, rendered from metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfbatch.pages import charts
from hfbatch.pages.page import render_page
from hfbatch.spec.finetune import FinetuneSpec

MOST_CELLS = 20
"""Maximum labels of the confusion matrix; with more, the most frequent confusions are listed."""
MOST_CONFUSIONS = 15
MOST_COUNTED = 12
"""Maximum number of labels whose rows are drawn as bars."""


def render_report(metrics: Mapping[str, Any]) -> str:
    """Renders the page. :param metrics: the content of metrics.json."""
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
    """Returns for each metric `name`, `baseline`, `before`, `best`, and `merged` (of the model with its adapters
    merged); None for values that do not exist.
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
    """Returns true label, predicted label and rows of the most frequent confusions, descending."""
    labels = confusion["labels"]
    found = [
        (labels[row], labels[column], count)
        for row, counts in enumerate(confusion["counts"])
        for column, count in enumerate(counts)
        if row != column and count
    ]
    return sorted(found, key=lambda one: -one[2])[:MOST_CONFUSIONS]


def draw(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Draws the charts as SVG; "" for those without data."""
    metric, evaluations, losses = metrics["metric"], metrics["evaluations"], metrics["losses"]
    training = [(entry["step"], entry["loss"]) for entry in losses]
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
            "loss", {"training": training, "evaluation": measured["loss"]}, "step", "Loss over steps"
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
