"""The version of results: it changes when a release computes other results than earlier ones.

An output holds results of one version only: parts of another one would differ without any sign of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESULTS_VERSION = 2
"""Raised by every release that changes the result of any row, or moves a row between output and rejects."""
KEY = "results"
"""Key of the version in an identity; missing in version 1."""
CHANGES: Mapping[int, tuple[str, ...]] = {
    2: (
        "a row whose output is NaN or infinite is a reject",
        "causal classifiers without a padding id read a row's last token by the mask, not by its id",
        "texts are truncated at the last position that a model such as RoBERTa has, not rejected",
        "a padding token without an embedding costs no row",
        "filters read times as UTC and distinguish Lang from lang",
        "INT96 timestamps outside 1677 to 2262 keep their year",
        "text files keep a value such as 007 as a string",
        "a training holds out rows by their content, so that identical rows stay together",
    ),
}
"""The changes of each version, one sentence per change."""


def version_of(identity: Mapping[str, Any]) -> int:
    """Returns the version of the results of a job with this identity."""
    return int(identity.get(KEY, 1))


def version_fault(output: str, job: Mapping[str, Any]) -> str | None:
    """Returns why an output of another version cannot be continued; None if its results are of this version.

    :param output: the output, as shown in the message.
    :param job: the content of its job.json.
    """
    there = version_of(job["identity"])
    if there == RESULTS_VERSION:
        return None
    by, other = job.get("hfbatch", "unknown"), "replace the output with --overwrite, or choose another one"
    if there > RESULTS_VERSION:
        return (
            f"output {output} was created by a newer hfbatch ({by}; results version {there}, here {RESULTS_VERSION}); "
            f"continue with that one, {other}"
        )
    changes = "; ".join(
        change for version, found in sorted(CHANGES.items()) if version > there for change in found
    )
    return (
        f"output {output} was begun by an older hfbatch ({by}; results version {there}, here {RESULTS_VERSION}), and "
        f"the rest would get other results: {changes}. Do one of: {other}, or finish it with the hfbatch "
        "that began it"
    )
