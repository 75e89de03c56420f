"""Faults and notes of all rows of a fine-tuning. Reads no files."""

from __future__ import annotations

from collections.abc import Mapping

from hfbatch.train.data.held_out import repeat_notes
from hfbatch.train.plan import FinetunePlan
from hfbatch.train.recipes.base import Survey

MOST_FAULTS = 30
"""Maximum number of faulty rows that an error names."""


def row_faults(plan: FinetunePlan, found: Mapping[str, Survey], whole: bool = True) -> list[str]:
    """Returns faults of single rows and of each set; passes the training set's labels to the recipe, notes duplicates.

    :param found: statistics and faults of `train` and `eval`.
    :param whole: whether all rows were read; else faults of a set as a whole are not known.
    """
    recipe = plan.recipe
    faults = [f"{name}: {fault}" for name, survey in found.items() for fault in survey.faults]
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], f"… and {len(faults) - MOST_FAULTS} more"]
    if faults:
        faults.append("leave such rows out with train.filter and eval.filter, or fix them")
    if plan.spec.eval is None:
        # All rows of a rare label may be held out; it is a label nevertheless.
        found["train"].labels.update(dict.fromkeys(found["eval"].labels, 0))
        hashes = [one for survey in found.values() for one in survey.hashes]
        plan.repeats = repeat_notes(hashes, plan.train.rows) if whole else []
    share = "; raise evaluation.fraction, or give eval" if plan.spec.eval is None else ""
    together = [f"{name} has no rows{share}" for name, survey in found.items() if not survey.rows]
    together += recipe.settle(found["train"], plan.types) + recipe.eval_faults(found["eval"])
    return faults + (together if whole else []) + recipe.metric_faults(plan.spec.evaluation.metric)


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
