"""What a fine-tuning will be, before it begins: rows, steps, weights, memory, lengths and time. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hfbatch.compute.machine import Node
from hfbatch.data.temporary import own_folder
from hfbatch.errors import SpecError
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.train.features import Part, examine, read_rows
from hfbatch.train.launch import Team, choose_team
from hfbatch.train.memory import held, kept_for_backward, skeleton
from hfbatch.train.model import trainable
from hfbatch.train.order import TrainOrder, check_shares, shares
from hfbatch.train.plan import FinetunePlan
from hfbatch.train.recipes.base import Recipe, Survey
from hfbatch.train.rows import FeatureRows
from hfbatch.train.surveys import label_notes, row_faults
from hfbatch.train.trial import sample, try_steps

SAMPLE_SPLITS = 4
"""Splits of each set of rows that are looked at without a cluster."""


def describe_training(plan: FinetunePlan) -> dict[str, Any]:
    """The training as plain values, by a few splits that are looked at here. Starts nothing.

    :raises SpecError: for faulty rows among those that were looked at.
    """
    surveys = {name: _survey(plan, part) for name, part in plan.parts.items()}
    workers = 1 if plan.spec.workers.count == "auto" else plan.spec.workers.count
    return _describe(plan, surveys, Team(workers, 0.0, 1.0, workers), False)


def try_training(plan: FinetunePlan, nodes: list[Node], ceiling: Node | None = None) -> dict[str, Any]:
    """The same by all rows, looked at on the cluster that ray is connected to, and by a few steps of a worker there.

    :param nodes: of the cluster; `ceiling`: what an autoscaler may grow it to, as for `choose_team`.
    :raises SpecError: for faulty rows, or a cluster that is too small.
    :raises WorkerError: if the model does not train there.
    """
    team = choose_team(plan.spec.workers, nodes, ceiling)
    batch = plan.spec.batch
    check_shares(batch.size, batch.per_device, team.at_least, team.workers, plan.recipe.group)
    surveys = {name: examine(plan.spec, plan.model, part) for name, part in plan.parts.items()}
    shown = _describe(plan, surveys, team, True)
    if plan.spec.workers.strategy == "fsdp":
        why = (
            "no trial: it would hold the whole model, which workers.strategy fsdp shares among the processes"
        )
        return {**shown, "workers": asdict(team), "notes": [*shown["notes"], why]}
    order = TrainOrder(plan.spec, plan.model, plan.recipe.settled, "")
    return _with_trial(plan, shown, try_steps(order, plan.train, team), team)


def _looked_at(part: Part) -> list[int]:
    """Numbers of the splits that are looked at without a cluster: evenly spaced."""
    last = len(part.splits) - 1
    return np.unique(np.linspace(0, last, min(SAMPLE_SPLITS, last + 1)).astype(int)).tolist()


def _survey(plan: FinetunePlan, part: Part) -> Survey:
    survey = Survey()
    plan.recipe.task.root = part.read.path
    for number in _looked_at(part):
        survey.add(plan.recipe.examine(*read_rows(number, part.splits[number], part)))
    return survey


def _describe(
    plan: FinetunePlan, surveys: Mapping[str, Survey], team: Team, everything: bool
) -> dict[str, Any]:
    spec, parts, recipe = plan.spec, plan.parts, plan.recipe
    rows = {name: _rows(parts[name], surveys[name], everything) for name in parts}
    whole = all(one["exact"] for one in rows.values())
    faults = row_faults(plan, surveys, whole)
    if faults:
        raise SpecError(faults)
    per_device, accumulation = shares(spec.batch.size, spec.batch.per_device, team.workers, recipe.group)
    model = skeleton(spec, recipe)
    changing, weights = trainable(model)
    with own_folder("plan-") as local:
        some, read, truncated = sample(recipe, plan.train, local)
        lengths = _lengths(some, read, truncated)
        activations = _activations(spec, recipe, model, some, per_device)
    steps, passes = _steps(plan, rows["train"]["rows"] * lengths["features_per_row"])
    few = "not all rows were looked at: rows and labels are estimates from a few splits"
    notes = [*plan.notes, *(label_notes(surveys["train"].labels) if whole else [few])]
    return {
        "task": spec.task,
        "method": spec.method.name,
        "model": {"name": plan.model.name, "commit": plan.model.commit},
        "output": spec.output,
        "finished": plan.finished,
        "fingerprint": plan.fingerprint,
        "rows": rows,
        "labels": dict(surveys["train"].labels),
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


def _rows(part: Part, survey: Survey, everything: bool) -> dict[str, Any]:
    """How many rows, and whether all of them were looked at; else an estimate by those that were."""
    total = sum(split.rows for split in part.splits)
    if everything or len(part.splits) <= SAMPLE_SPLITS:
        return {"rows": survey.rows, "exact": True}
    seen = sum(part.splits[number].rows for number in _looked_at(part))
    return {"rows": round(survey.rows * total / max(seen, 1)), "exact": False}


def _lengths(rows: FeatureRows, read: int, truncated: int) -> dict[str, Any]:
    """Tokens of a sample of the training rows: `p50`, `p95`, `max`; `rows` it has; `truncated`, the share cut off."""
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
    """Optimizer steps, and how often each row is seen."""
    schedule = plan.spec.schedule
    each = max(math.ceil(features / plan.spec.batch.size), 1)
    steps = schedule.steps or math.ceil(schedule.epochs * each)
    return steps, round(steps / each, 2)


def _activations(
    spec: FinetuneSpec, recipe: Recipe, model: Any, rows: FeatureRows, per_device: int
) -> int | None:
    """Bytes that a forward pass of the longest row of the sample keeps, repeated to a batch, in float32.

    :param model: one without weights; None is returned where it cannot run, since what it does depends on values.
    """
    from hfbatch.train.training import collator

    if spec.compute.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = collator(recipe, model)(rows)([int(rows.lengths.argmax())] * per_device)
    inputs = {name: value.to("meta") for name, value in batch.items() if not name.endswith("attention_mask")}
    labels = inputs.pop("labels")

    def forward() -> Any:
        outputs = model(**inputs)
        try:
            return recipe.loss(outputs, labels, 1)
        except (RuntimeError, NotImplementedError):  # a loss that depends on values; it keeps little
            return outputs

    try:
        return kept_for_backward(model, forward)
    except (RuntimeError, NotImplementedError):
        return None


def _with_trial(
    plan: FinetunePlan, shown: dict[str, Any], found: dict[str, Any], team: Team
) -> dict[str, Any]:
    """The description with what a trial has shown."""
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
