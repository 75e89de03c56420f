"""The contract of sinks: where the rows of a job go. A sink need not keep a file for each split.

Workers use a `SinkWriter`: `stage` makes a split's rows ready, `commit` makes them visible, all at once. A split that
is staged and not committed does not count, and is staged again by the next run. The driver uses a `Sink`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from hfbatch.data.splits import Split
from hfbatch.output.manifest import Manifest


@dataclass(frozen=True)
class State:
    """The splits of a plan compared with what is committed."""

    done: list[Split]
    todo: list[Split]
    stale: list[str]
    """What is committed of no split of the plan, sorted: its input was changed, removed or split differently."""


class Sink(Protocol):
    """What the driver asks of a sink. A committed split is named by `Split.part`."""

    def state(self, splits: Sequence[Split]) -> State:
        """Compares splits with what is committed, by names alone: its cost grows with splits, not with rows."""

    def audit(
        self, splits: Sequence[Split], fingerprint: str, fresh: Iterable[Manifest] = ()
    ) -> tuple[State, list[Manifest], dict[str, str]]:
        """Compares splits with what is committed and what the sink recorded about it, and with nothing else.

        What is committed of another job, or incomplete, counts as not done. What cannot be read counts as done, with
        its error.

        :param fresh: manifests of splits that were just committed.
        :returns: the state; the manifests of the splits done, in order; the faults of those that are not done.
        """

    def discard(self, stale: Collection[str]) -> None:
        """Deletes what is committed under names of no split. :raises OSError: if that fails."""

    def clear(self) -> None:
        """Deletes everything that is committed, of an earlier job too. :raises OSError: if that fails."""

    def finalise(self, done: Sequence[Split]) -> None:
        """Deletes what attempts left that were never committed; called when all splits are done.

        :raises OSError: if that fails.
        """


class SinkWriter(Protocol):
    """What a worker asks of a sink."""

    def stage(self, split: Split, table: pa.Table, rejects: pa.Table | None, manifest: Manifest) -> Any:
        """Makes the rows of a split and its rejects ready; returns what `commit` takes.

        :raises LockLostError: if this job no longer holds the output.
        :raises SplitError: if rows are not conserved, columns are not the planned ones, or writing fails.
        """

    def commit(self, staged: Any) -> None:
        """Makes what is staged visible, all or nothing, in place of an earlier commit of the split.

        :raises LockLostError: if this job no longer holds the output.
        :raises SplitError: if writing fails.
        """
