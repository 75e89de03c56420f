"""Fits a recipe to the statistics of the rows of a fine-tuning; reports their faults. Reads no rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from hfbatch.errors import SpecError
from hfbatch.train.data.held_out import repeat_notes
from hfbatch.train.loop.worker_config import build_recipe
from hfbatch.train.plan import FinetunePlan
from hfbatch.train.recipes.base import DatasetStatistics

MOST_FAULTS = 30
"""Maximum number of faulty rows that an error names."""


def fit_plan(plan: FinetunePlan, found: Mapping[str, DatasetStatistics], whole: bool = True) -> FinetunePlan:
    """Returns the plan with a recipe that is fitted to the training set, its labels, and notes on duplicate rows.

    :param found: statistics and faults of `train` and `eval`.
    :param whole: whether all rows were read; else faults of a set as a whole are not known.
    :raises SpecError: with the faults of single rows, of each set, and of the metric.
    """
    train, spec = found["train"], plan.spec
    if spec.eval is None:
        # All rows of a rare label may be held out; it is a label nevertheless.
        labels = Counter(train.labels)
        labels.update(dict.fromkeys(found["eval"].labels, 0))
        train = replace(train, labels=labels)
    recipe = build_recipe(spec, plan.model, plan.recipe.fit(train, plan.types))
    faults = _row_faults(found)
    if whole:
        share = "; raise evaluation.fraction, or give eval" if spec.eval is None else ""
        faults += [f"{name} has no rows{share}" for name, one in found.items() if not one.rows]
        faults += recipe.train_faults(train, plan.types) + recipe.eval_faults(found["eval"])
    faults += recipe.metric_faults(spec.evaluation.metric)
    if faults:
        raise SpecError(faults)
    hashes = [one for statistics in found.values() for one in statistics.hashes]
    repeats = repeat_notes(hashes, plan.train.rows) if spec.eval is None and whole else []
    return replace(plan, recipe=recipe, labels=dict(train.labels), repeats=repeats)


def _row_faults(found: Mapping[str, DatasetStatistics]) -> list[str]:
    """Returns faults of single rows, of which at most MOST_FAULTS are named."""
    faults = [f"{name}: {fault}" for name, statistics in found.items() for fault in statistics.faults]
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], f"… and {len(faults) - MOST_FAULTS} more"]
    if faults:
        faults.append("leave such rows out with train.filter and eval.filter, or fix them")
    return faults


def label_notes(labels: Mapping[str, int]) -> list[str]:
    """Returns a note on labels without training rows. :param labels: number of training rows by label."""
    lacking = [repr(label) for label, rows in labels.items() if not rows]
    if not lacking:
        return []
    shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else "")
    return [
        f"no training row has the label {shown}: all such rows are in the held-out evaluation set, where they count as "
        "wrong; give more of them, or another seed"
    ]
