"""The manifest of a finished split: counts, costs, reasons of rejects. One JSON object per split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LENGTH_EDGES = (0, 1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, *(2**n for n in range(10, 21)))
"""Edges of the bins of token counts, about half an octave each; the last bin includes all larger counts."""


@dataclass
class Manifest:
    """The outcome of one split. Rows are conserved: `rows_in == rows_out + rows_rejected`."""

    part: str
    """File name of the part, which identifies the split."""
    error: str | None = None
    """Why the split failed; None if its part is written."""
    fatal: bool = False
    """Whether every other split would fail the same way."""
    rows_read: int = 0
    """Rows of the split before the filter."""
    rows_in: int = 0
    """Rows after the filter."""
    rows_out: int = 0
    rows_rejected: int = 0
    rows_truncated: int = 0
    rows_repeated: int = 0
    """Rows that got the result of an identical row."""
    tokens: int = 0
    """Tokens of the other rows, without padding."""
    padded_tokens: int = 0
    """Tokens that the device computed, padding included."""
    batches: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    """What an endpoint was asked and counted: requests, prompt_tokens, new_tokens; empty for other engines."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Busy seconds of each stage: read, preprocess, forward, postprocess, write."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rejected rows by `stage: error type`."""
    traces: dict[str, str] = field(default_factory=dict)
    """The first traceback of each kind of failure; not stored with the part."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Columns that are not in the plan, with the number of rows in which they hold a value."""
    lengths: list[int] = field(default_factory=list)
    """Rows in each bin of LENGTH_EDGES."""
    histogram: list[int] = field(default_factory=list)
    """Rows in each bin of the task's histogram."""
    worker: str = ""
    """Host and device that ran forward."""
    started: float = 0.0
    finished: float = 0.0
    """Unix times of the start of reading and of the commit."""

    def to_json(self) -> str:
        """Returns the manifest as one line of JSON."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parses the result of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)


def unplanned_columns(manifests: Iterable[Manifest]) -> dict[str, int]:
    """Returns columns that are not in the plan, with the number of rows in which they hold a value."""
    found: Counter[str] = Counter()
    for manifest in manifests:
        found.update(manifest.unplanned)
    return dict(found.most_common())
