"""A bounded load on an endpoint: how long requests take, and how many rows are answered in a second."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np

from hfbatch.console.display import add, facts, show
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.errors import SpecError
from hfbatch.predict.bind import bind
from hfbatch.predict.preview import first_rows
from hfbatch.serve.plan import ServePlan
from hfbatch.serve.rows import RowReader, plain

if TYPE_CHECKING:
    from rich.console import Console

ROUNDS = 10
"""Requests for each concurrent client."""
ROWS = 1000
"""Rows of an input that are sent in turn."""
MOST_TRIES = 20
NO_ANSWER = 0
"""In place of the status of a request whose connection failed or timed out."""


@dataclass(frozen=True)
class Load:
    """What a load has shown."""

    name: str
    requests: int
    concurrent: int
    seconds: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    retries: int
    """Requests that were sent again after 429."""
    statuses: dict[int, int]
    """Number of final answers by status of HTTP."""

    @property
    def rate(self) -> float:
        """Rows that were answered in a second; each request has one."""
        return self.statuses.get(200, 0) / max(self.seconds, 1e-9)

    def to_values(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {**asdict(self), "rows_per_s": self.rate}


def run_check(plan: ServePlan, url: str, concurrent: int) -> Load:
    """Sends rows, one in each request, from several clients at once.

    :raises SpecError: see `sample_rows`.
    """
    token = os.environ.get(plan.spec.serve.token_env or "")
    return asyncio.run(
        send_load(plan.spec.serve.name, f"{url}/predict", sample_rows(plan), concurrent, token)
    )


def sample_rows(plan: ServePlan) -> list[dict[str, Any]]:
    """Returns rows as requests carry them: the first of the input that the spec names, else the task's example.

    :raises SpecError: if the input cannot be read, or the example holds names of files.
    """
    if plan.spec.input.path:
        faults: list[str] = []
        bound = bind(
            plan.spec.model_copy(update={"input": with_absolute_paths(plan.spec.input)}), None, faults
        )
        if faults or bound is None:
            raise SpecError(faults)
        rows, rendered = first_rows(bound, ROWS).table, bound.read.rendered
        names = {name: name for name in sorted(rendered.columns)} if rendered else {}
        given = {
            name: column for name, column in bound.inputs.items() if not rendered or column != rendered.name
        }
        columns = arrays_of(rows, {**names, **given})
        values = {name: [_sent(value) for value in array.to_pylist()] for name, array in columns.items()}
    elif RowReader.of(plan.task).rendered or any(column.files for column in plan.task.columns()):
        raise SpecError(
            "--check: the example of this task names files, or has no columns for the template; add the `input` of a job to the spec"
        )
    else:
        values = dict(plan.task.EXAMPLE.rows)
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _sent(value: Any) -> Any:
    """A value as JSON can hold it: bytes as a `data:` URL."""
    return f"data:;base64,{plain(value)}" if isinstance(value, bytes) else plain(value)


async def send_load(
    name: str,
    url: str,
    rows: list[dict[str, Any]],
    concurrent: int,
    token: str | None = None,
    rounds: int = ROUNDS,
) -> Load:
    """Sends requests from several clients. A request that gets 429 is sent again after the pause it names.

    :param rows: sent in turn.
    :param rounds: requests of each client, one after another.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    retries = 0

    async def client(first: int, session: aiohttp.ClientSession) -> None:
        """Sends one request after another."""
        nonlocal retries
        for turn in range(rounds):
            body = {"rows": [rows[(first + turn) % len(rows)]]}
            begun = time.perf_counter()
            for _ in range(MOST_TRIES):
                try:
                    async with session.post(url, json=body) as response:
                        await response.read()
                except (aiohttp.ClientError, TimeoutError):
                    status = NO_ANSWER
                    break
                status = response.status
                if status != 429:
                    break
                retries += 1
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))
            statuses[status] += 1
            taken.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    connector = aiohttp.TCPConnector(limit=concurrent)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        await asyncio.gather(*(client(first, session) for first in range(concurrent)))
    seconds = time.perf_counter() - begun
    p50, p95, p99 = (float(value) * 1000 for value in np.percentile(taken, [50, 95, 99]))
    return Load(name, len(taken), concurrent, seconds, p50, p95, p99, retries, dict(statuses))


def render(loads: list[Load], console: Console) -> None:
    """Shows the numbers."""
    about = facts()
    for load in loads:
        sent = f"{load.requests:,}, {load.concurrent} concurrent, in {load.seconds:.1f} s"
        add(about, "endpoint", load.name)
        add(about, "requests", f"{sent}; {load.retries} sent again after 429")
        add(about, "rows/s", f"{load.rate:,.1f}")
        add(about, "latency", f"p50 {load.p50_ms:.0f} ms, p95 {load.p95_ms:.0f} ms, p99 {load.p99_ms:.0f} ms")
        other = {status: count for status, count in load.statuses.items() if status != 200}
        if other:
            kinds = {status: f"with status {status}" for status in other} | {NO_ANSWER: "without an answer"}
            shown = ", ".join(f"{count} {kinds[status]}" for status, count in sorted(other.items()))
            add(about, "errors", shown)
    show(console, about)
