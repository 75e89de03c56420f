"""Estimates rows, steps, weights, memory, lengths and time of a fine-tuning before it begins. Writes no output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hfbatch.data.temporary import own_folder
from hfbatch.runtime.machine import Node
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.data.rows import FeatureRows
from hfbatch.train.features import Part, validate_rows, validate_split
from hfbatch.train.loop.memory import held, kept_for_backward, skeleton
from hfbatch.train.loop.model import trainable
from hfbatch.train.loop.worker_config import TrainWorkerConfig, build_recipe, check_shares, shares
from hfbatch.train.plan import FinetunePlan
from hfbatch.train.recipes.base import DatasetStatistics, Recipe
from hfbatch.train.trial import sample, try_steps
from hfbatch.train.validation import fit_plan, label_notes
from hfbatch.train.worker_group import WorkerGroup, choose_worker_group

SAMPLE_SPLITS = 4
"""Number of splits of each set of rows that are read without a cluster."""


def describe_training(plan: FinetunePlan) -> dict[str, Any]:
    """Describes the training as plain values, estimated from a few splits. Does not start Ray.

    :raises SpecError: for faulty rows among those that were read.
    """
    workers = 1 if plan.spec.workers.count == "auto" else plan.spec.workers.count
    return _describe(*fit_to_sample(plan), WorkerGroup(workers, 0.0, 1.0, workers))


def fit_to_sample(plan: FinetunePlan) -> tuple[FinetunePlan, dict[str, Any]]:
    """Fits the plan to a few splits, read in this process.

    :returns: the plan; for `train` and `eval` the number of `rows`, and whether it is `exact` or an estimate.
    :raises SpecError: for faulty rows among those that were read.
    """
    found = {name: _statistics(plan, part) for name, part in plan.parts.items()}
    rows = {name: _rows(part, found[name].rows) for name, part in plan.parts.items()}
    return fit_plan(plan, found, whole=all(one["exact"] for one in rows.values())), rows


def try_training(plan: FinetunePlan, nodes: list[Node], ceiling: Node | None = None) -> dict[str, Any]:
    """Describes the training from all rows, read on the connected Ray cluster, and a few steps of a worker there.

    :param nodes: nodes of the cluster; `ceiling`: what an autoscaler may grow it to, as for `choose_worker_group`.
    :raises SpecError: for faulty rows, or a cluster that is too small.
    :raises WorkerError: if the model cannot be trained there.
    """
    team = choose_worker_group(plan.spec.workers, nodes, ceiling)
    batch = plan.spec.batch
    check_shares(batch.size, batch.per_device, team.at_least, team.workers, plan.recipe.group)
    found = {name: validate_rows(plan.spec, plan.model, part) for name, part in plan.parts.items()}
    plan = fit_plan(plan, found)
    shown = _describe(plan, {name: {"rows": one.rows, "exact": True} for name, one in found.items()}, team)
    if plan.spec.workers.strategy == "fsdp":
        why = "no trial: it would need memory for the whole model, which workers.strategy fsdp shards"
        return {**shown, "workers": asdict(team), "notes": [*shown["notes"], why]}
    config = TrainWorkerConfig(plan.spec, plan.model, plan.recipe.fitted, "")
    return _with_trial(plan, shown, try_steps(config, plan.train, team), team)


def _sampled(part: Part) -> list[int]:
    """Returns the numbers of the splits that are read without a cluster: evenly spaced."""
    last = len(part.splits) - 1
    return np.unique(np.linspace(0, last, min(SAMPLE_SPLITS, last + 1)).astype(int)).tolist()


def _statistics(plan: FinetunePlan, part: Part) -> DatasetStatistics:
    """Validates the rows of a few splits in this process."""
    statistics = DatasetStatistics()
    recipe = build_recipe(plan.spec, plan.model, files=part.files)
    for number in _sampled(part):
        statistics.add(validate_split(recipe, part.splits[number], part))
    return statistics


def _describe(plan: FinetunePlan, rows: Mapping[str, dict[str, Any]], team: WorkerGroup) -> dict[str, Any]:
    """Returns what `describe_training` returns for a plan that is fitted to its rows. :param rows: see `fit_to_sample`."""
    spec, recipe = plan.spec, plan.recipe
    whole = all(one["exact"] for one in rows.values())
    per_device, accumulation = shares(spec.batch.size, spec.batch.per_device, team.workers, recipe.group)
    model = skeleton(spec, recipe)
    changing, weights = trainable(model)
    with own_folder("plan-") as local:
        reader = build_recipe(spec, plan.model, recipe.fitted, plan.train.files)
        some, read, truncated = sample(reader, plan.train, local)
        lengths = _lengths(some, read, truncated)
        activations = _activations(spec, recipe, model, some, per_device)
    steps, passes = _steps(plan, rows["train"]["rows"] * lengths["features_per_row"])
    few = "not all rows were read: rows and labels are estimates from a few splits"
    notes = [*plan.notes, *(label_notes(plan.labels) if whole else [few])]
    return {
        "task": spec.task,
        "method": spec.method.name,
        "model": {"name": plan.model.name, "commit": plan.model.commit},
        "output": spec.output,
        "finished": plan.finished,
        "fingerprint": plan.fingerprint,
        "rows": rows,
        "labels": plan.labels,
        "metric": plan.metric,
        "steps": steps,
        "epochs": passes,
        "batch": {
            "size": spec.batch.size,
            "per_device": per_device,
            "accumulation": accumulation,
            "workers": team.workers,
        },
        "weights": weights,
        "trainable": changing,
        "memory": held(spec, weights, changing, activations, team.workers),
        "memory_dtype": "float32",
        "lengths": lengths,
        "notes": notes,
    }


def _rows(part: Part, rows: int) -> dict[str, Any]:
    """Returns the number of `rows`, and whether it is `exact` or an estimate. :param rows: those of the splits read."""
    if len(part.splits) <= SAMPLE_SPLITS:
        return {"rows": rows, "exact": True}
    seen = sum(part.splits[number].rows for number in _sampled(part))
    return {"rows": round(rows * part.rows / max(seen, 1)), "exact": False}


def _lengths(rows: FeatureRows, read: int, truncated: int) -> dict[str, Any]:
    """Returns token lengths of a sample of the training set: `p50`, `p95`, `max`; its `rows`; share `truncated`."""
    lengths = rows.lengths
    p50, p95, most = np.quantile(lengths, [0.5, 0.95, 1])
    return {
        "rows": read,
        "features_per_row": len(lengths) / read,
        "mean": float(lengths.mean()),
        "p50": int(p50),
        "p95": int(p95),
        "max": int(most),
        "truncated": truncated / read,
    }


def _steps(plan: FinetunePlan, features: float) -> tuple[int, float]:
    """Returns the number of optimizer steps, and of epochs."""
    schedule = plan.spec.schedule
    each = max(math.ceil(features / plan.spec.batch.size), 1)
    steps = schedule.steps or math.ceil(schedule.epochs * each)
    return steps, round(steps / each, 2)


def _activations(
    spec: FinetuneSpec, recipe: Recipe, model: Any, rows: FeatureRows, per_device: int
) -> int | None:
    """Returns the activation bytes of a float32 forward pass of a batch with copies of the longest sampled row.

    :param model: a model on the meta device; None is returned if its forward pass depends on values.
    """
    from hfbatch.train.loop.training import collator

    if spec.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = collator(recipe, model)(rows)([int(rows.lengths.argmax())] * per_device)
    inputs = {name: value.to("meta") for name, value in batch.items() if not name.endswith("attention_mask")}
    labels = inputs.pop("labels")

    def forward() -> Any:
        outputs = model(**inputs)
        try:
            return recipe.loss(outputs, labels, 1)
        except (RuntimeError, NotImplementedError):  # a loss that depends on values; it saves little
            return outputs

    try:
        return kept_for_backward(model, forward)
    except (RuntimeError, NotImplementedError):
        return None


def _with_trial(
    plan: FinetunePlan, shown: dict[str, Any], found: dict[str, Any], team: WorkerGroup
) -> dict[str, Any]:
    """Adds the measurements of a trial to the description."""
    every = plan.spec.evaluation.every
    times = math.ceil(shown["epochs"]) if every == "epoch" else shown["steps"] // every
    evaluation = shown["rows"]["eval"]["rows"] / (found["eval_rows_per_s"] * team.workers)
    eta = found["load_seconds"] + shown["steps"] * found["seconds_per_step"] + (times + 1) * evaluation
    memory = held(plan.spec, found["weights"], found["trainable"], found["activations"], team.workers)
    return {
        **shown,
        "weights": found["weights"],
        "trainable": found["trainable"],
        "memory": memory,
        "memory_dtype": found["dtype"],
        "workers": asdict(team),
        "trial": {**found, "evaluations": times + 1, "eta_s": eta},
    }
