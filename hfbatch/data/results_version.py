"""The version of results: what a release answers otherwise than the ones before it. Knows nothing of jobs.

An output holds the answers of one version: a part of another beside it would differ, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESULTS_VERSION = 2
"""Goes up with every release that gives any row another answer, or another place between output and rejects."""
KEY = "results"
"""Where an identity has it; outputs of version 1 have none."""
CHANGES: Mapping[int, tuple[str, ...]] = {
    2: (
        "a row whose output is NaN or infinite is a reject",
        "causal classifiers without a padding id read a row's last token by the mask, not by its id",
        "texts are cut at the last position that a model such as RoBERTa has, not rejected",
        "a padding token without an embedding costs no row",
        "filters read times as UTC and tell Lang from lang",
        "INT96 timestamps outside 1677 to 2262 keep their year",
        "text files keep a value such as 007 as a string",
        "a training holds out rows by what they hold, so that rows that hold the same stay together",
    ),
}
"""What each version changed, one sentence a change."""


def version_of(identity: Mapping[str, Any]) -> int:
    """The version of the results of a job with this identity."""
    return int(identity.get(KEY, 1))


def version_fault(output: str, job: Mapping[str, Any]) -> str | None:
    """Why the work left in an output cannot be done; None if its results are of this version.

    :param output: how it is shown.
    :param job: its job.json.
    """
    there = version_of(job["identity"])
    if there == RESULTS_VERSION:
        return None
    by, other = job.get("hfbatch", "unknown"), "replace the output with --overwrite, or choose another one"
    if there > RESULTS_VERSION:
        return (
            f"output {output} was begun by a newer hfbatch ({by}; results version {there}, here {RESULTS_VERSION}); "
            f"go on with that one, {other}"
        )
    changes = "; ".join(
        change for version, found in sorted(CHANGES.items()) if version > there for change in found
    )
    return (
        f"output {output} was begun by an older hfbatch ({by}; results version {there}, here {RESULTS_VERSION}), and "
        f"what is left of it would be answered otherwise: {changes}. Do one of: {other}, or finish it with the hfbatch "
        "that began it"
    )
