"""Counters of an endpoint for Prometheus, summed over its replicas. Does not import Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric

from hfbatch.serve.rows import Answer

Family = tuple[str, str, str]
"""Name, type and description of a metric."""
Sample = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels of one of its numbers."""
Snapshot = dict[Family, dict[Sample, float]]
Gather = Callable[[Snapshot], Awaitable[Sequence[Snapshot]]]
"""Takes the numbers of this replica; returns those of all of them."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


async def _alone(snapshot: Snapshot) -> Sequence[Snapshot]:
    return [snapshot]


class Metrics:
    """The counters of a replica. :param gather: fetches those of the other replicas; default: there are none."""

    def __init__(self, gather: Gather = _alone) -> None:
        self._gather = gather
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("hfbatch_requests", "Requests", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "hfbatch_request_seconds",
            "Duration until the answer begins",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._rows = Counter("hfbatch_rows", "Rows that were answered", registry=registry)
        self._rejects = Counter("hfbatch_rejects", "Rows that were rejected", ["reason"], registry=registry)
        self._tokens = Counter("hfbatch_tokens", "Tokens that the model has read", registry=registry)
        self._together = Histogram(
            "hfbatch_rows_together", "Rows that were collected for the model", buckets=ROWS, registry=registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request. :param route: the path as the application has it."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def rows(self, answers: Sequence[Answer]) -> None:
        """Counts the rows of a request."""
        for answer in answers:
            if answer.reject:
                self._rejects.labels(answer.reject.reason).inc()
            else:
                self._rows.inc()
                self._tokens.inc(answer.tokens)

    def together(self, rows: int) -> None:
        """Counts the rows of several requests that were answered together."""
        self._together.observe(rows)

    def snapshot(self) -> Snapshot:
        """The numbers, without the times at which they were first counted."""
        return {
            (metric.name, metric.type, metric.documentation): {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for sample in metric.samples
                if not sample.name.endswith("_created")
            }
            for metric in self._registry.collect()
        }

    async def expose(self) -> bytes:
        """The sums over all replicas in the text format of Prometheus."""
        return to_text(await self._gather(self.snapshot()))


class Board:
    """Keeps the last numbers of each replica. Those of replicas that have ended stay: a counter never falls."""

    def __init__(self) -> None:
        self._kept: dict[str, Snapshot] = {}

    def exchange(self, replica: str, snapshot: Snapshot) -> list[Snapshot]:
        """Stores the numbers of a replica; returns those of all."""
        self._kept[replica] = snapshot
        return list(self._kept.values())


def to_text(snapshots: Sequence[Snapshot]) -> bytes:
    """The sums of several snapshots in the text format of Prometheus."""
    sums: Snapshot = {}
    for snapshot in snapshots:
        for family, samples in snapshot.items():
            into = sums.setdefault(family, {})
            for sample, value in samples.items():
                into[sample] = into.get(sample, 0.0) + value
    return generate_latest(_Collected(sums))


class _Collected(CollectorRegistry):
    """A registry of numbers that were collected elsewhere."""

    def __init__(self, sums: Mapping[Family, Mapping[Sample, float]]) -> None:
        super().__init__()
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        """One metric for each family."""
        for (name, kind, text), samples in self._sums.items():
            metric = Metric(name, text, kind)
            for (sample, labels), value in samples.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
