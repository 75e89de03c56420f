"""What is wrong with the rows of a fine-tuning, taken together. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping

from hfbatch.train.held_out import repeat_notes
from hfbatch.train.plan import FinetunePlan
from hfbatch.train.recipes.base import Survey

MOST_FAULTS = 30
"""Faulty rows that an error names."""


def row_faults(plan: FinetunePlan, surveys: Mapping[str, Survey], whole: bool = True) -> list[str]:
    """Faults of the rows, each and all together; settles the recipe by those of training, and notes rows that repeat.

    :param surveys: of `train` and `eval`.
    :param whole: whether all rows were looked at; else what is wrong with them all together is not known.
    """
    recipe = plan.recipe
    faults = [f"{name}: {fault}" for name, survey in surveys.items() for fault in survey.faults]
    if len(faults) > MOST_FAULTS:
        faults = [*faults[:MOST_FAULTS], f"… and {len(faults) - MOST_FAULTS} more"]
    if faults:
        faults.append("leave such rows out with train.filter and eval.filter, or mend them")
    if plan.spec.eval is None:
        # A rare label may fall whole into the share that is set aside: it is a label all the same.
        surveys["train"].labels.update(dict.fromkeys(surveys["eval"].labels, 0))
        hashes = [one for survey in surveys.values() for one in survey.hashes]
        plan.repeats = repeat_notes(hashes, plan.train.rows) if whole else []
    share = "; raise evaluation.fraction, or give eval" if plan.spec.eval is None else ""
    together = [f"{name} has no rows{share}" for name, survey in surveys.items() if not survey.rows]
    together += recipe.settle(surveys["train"], plan.types) + recipe.eval_faults(surveys["eval"])
    return faults + (together if whole else []) + recipe.metric_faults(plan.spec.evaluation.metric)


def label_notes(labels: Mapping[str, int]) -> list[str]:
    """What to mind about labels, by how many training rows have them."""
    lacking = [repr(label) for label, rows in labels.items() if not rows]
    if not lacking:
        return []
    shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5:,} more" if len(lacking) > 5 else "")
    return [
        f"no training row has the label {shown}: all such rows are in the share that is set aside to measure with, where "
        "they count as wrong; give more of them, or another seed"
    ]
