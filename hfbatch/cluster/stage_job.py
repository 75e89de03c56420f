"""The description of a job for the stages of a split, as plain values. Does not import Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hfbatch.data.reader import ReadPlan
from hfbatch.output.lock import Claim


@dataclass(frozen=True)
class StageJob:
    """The description of a job for every stage."""

    runner: str
    """The RunnerConfig as JSON."""
    read: ReadPlan
    inputs: dict[str, str]
    """Task input to column of the rows."""
    keep: tuple[str, ...]
    rows: int
    """Rows of the splits to process, before the filter."""
    out: str
    schema: pa.Schema
    """Schema of the parts: the kept columns, then the task's, then `truncated` if there is one."""
    truncated: str | None
    """Name of the column that marks truncated rows."""
    rejects_schema: pa.Schema
    stamp: dict[str, Any]
    """Written to the parts' footers: fingerprint and model commit."""
    claim: Claim | None = None
    """The job's hold on the output, checked before every commit."""
    tracker: Any = None
    """The actor handle of the tracker; None before it is started."""
