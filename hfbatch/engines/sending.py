"""Sends requests to an endpoint, and again where it has no room or does not answer."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import islice
from typing import Any, TypeVar

import aiohttp

from hfbatch.errors import WorkerError, one_line

AGAIN = frozenset((408, 409, 429, 500, 502, 503, 504))
"""States of HTTP after which a request is sent again."""
REFUSED = frozenset((401, 403))
"""States of HTTP that all requests would get."""
MOST_TRIES = 8
LONGEST_PAUSE_S = 60.0
MOST_BYTES = 256 << 20
"""Largest answer: 2,048 vectors of 4,096 numbers, as text."""


T = TypeVar("T")


class UnansweredError(WorkerError):
    """No attempt to send a request was answered in full."""


class Sender:
    """A client of one endpoint.

    :param url: of the API, without /v1.
    :param refused_hint: what to do about a token that is refused, as part of a sentence.
    :param kept_hint: what holds of the requests answered until an error.
    :param per_minute: maximum rate of requests; None for no limit.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        refused_hint: str,
        kept_hint: str,
        per_minute: float | None = None,
    ) -> None:
        self._session, self._url = session, url
        self._refused_hint, self._kept_hint = refused_hint, kept_hint
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = time.monotonic()
        self.sent = 0
        """Requests, those that were sent again included."""

    async def post(self, path: str, body: object, name: str) -> tuple[int, object]:
        """Sends a request until it is answered; returns the status and the body.

        :param name: of the request, for errors.
        :raises UnansweredError: if no attempt is answered in full.
        :raises WorkerError: if no request would be answered.
        """
        for attempt in range(MOST_TRIES):
            last = attempt == MOST_TRIES - 1
            await self._turn()
            self.sent += 1
            try:
                # A redirect would take the request to another host, or make it a GET.
                async with self._session.post(self._url + path, json=body, allow_redirects=False) as response:
                    self._check_status(response)
                    if response.status not in AGAIN or last:
                        return response.status, await _body(response)
                    pause = _asked(response.headers.get("Retry-After"))
            except (aiohttp.ClientError, TimeoutError) as error:
                if last:
                    raise UnansweredError(
                        f"the endpoint at {self._url} does not answer request {name!r}: {one_line(error)}; "
                        f"{self._kept_hint}"
                    ) from error
                pause = 0.0
            # Full jitter on exponential backoff, so that requests which failed together do not return together.
            await asyncio.sleep(max(pause, random.uniform(0, min(2.0**attempt, LONGEST_PAUSE_S))))  # noqa: S311 - no secret
        raise AssertionError("every attempt returns, raises or pauses")

    async def is_there(self) -> bool:
        """Whether the endpoint answers anything at all."""
        try:
            async with self._session.get(f"{self._url}/v1/models", allow_redirects=False):
                return True
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _turn(self) -> None:
        """Waits until the rate allows one more request."""
        if not self._interval:
            return
        now = time.monotonic()
        self._next = max(self._next, now) + self._interval
        await asyncio.sleep(self._next - self._interval - now)

    def _check_status(self, response: aiohttp.ClientResponse) -> None:
        if 300 <= response.status < 400:
            to = response.headers.get("Location", "another place")
            raise WorkerError(
                f"the endpoint at {self._url} redirects requests to {to}; give the URL that answers them"
            )
        if response.status in REFUSED:
            raise WorkerError(
                f"the endpoint at {self._url} answers {response.status}: {self._refused_hint}; {self._kept_hint}"
            )


@asynccontextmanager
async def connected(
    concurrent: int, token: str | None, seconds: float
) -> AsyncIterator[aiohttp.ClientSession]:
    """Opens connections to an endpoint.

    :param token: sent as a bearer token.
    :param seconds: that a request may take.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=seconds),
        headers=headers,
        connector=aiohttp.TCPConnector(limit=concurrent),
    ) as session:
        yield session


@contextmanager
def sender_of(
    url: str,
    concurrent: int,
    token: str | None,
    seconds: float,
    refused_hint: str,
    kept_hint: str,
    per_minute: float | None = None,
) -> Iterator[tuple[asyncio.Runner, Sender]]:
    """An event loop and a sender for code that has none; see `connected` and `Sender`."""
    with asyncio.Runner() as loop:
        ends = AsyncExitStack()
        session = loop.run(ends.enter_async_context(connected(concurrent, token, seconds)))
        try:
            yield loop, Sender(session, url, refused_hint, kept_hint, per_minute)
        finally:
            loop.run(ends.aclose())


def as_answered(
    loop: asyncio.Runner,
    jobs: Iterable[Coroutine[Any, Any, T]],
    most: int,
    check: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """Runs jobs, at most so many together, and yields their results in the order in which they end.

    :param check: called each second; what it raises ends all jobs.
    """
    left = iter(jobs)
    done: set[asyncio.Task[T]] = set()
    waiting: set[asyncio.Task[T]] = set()
    try:
        while True:
            waiting |= {loop.get_loop().create_task(job) for job in islice(left, max(most - len(waiting), 0))}
            if not waiting:
                return
            done, waiting = loop.run(_first_of(waiting))
            check()
            for task in done:
                yield task.result()
    finally:
        # Several of `done` may have failed: the first is raised, and the others have to be asked for their errors.
        loop.run(_cancelled(waiting | done))


async def _first_of(waiting: set[asyncio.Task[T]]) -> tuple[set[asyncio.Task[T]], set[asyncio.Task[T]]]:
    return await asyncio.wait(waiting, timeout=1, return_when=asyncio.FIRST_COMPLETED)


async def _cancelled(tasks: set[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _body(response: aiohttp.ClientResponse) -> object:
    """The body of an answer; NaN, which JSON does not have, is null.

    :raises aiohttp.ClientPayloadError: if it is not JSON, though the request has succeeded.
    """
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MOST_BYTES:
            raise aiohttp.ClientPayloadError(f"its answer is larger than {MOST_BYTES >> 20} MiB")
    try:
        return json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        text = data[:500].decode(errors="replace")
        if response.status < 300:
            raise aiohttp.ClientPayloadError(f"it answers {text[:80]!r}, which is not JSON") from error
        return {"error": {"message": text, "code": response.status}}


def _asked(header: str | None) -> float:
    """The seconds of a Retry-After header; its other form, a date, is left to backoff."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_PAUSE_S) if seconds > 0 else 0.0  # NaN is not above 0


def free_port() -> int:
    """A port of this machine on which nothing listens at the moment.

    It is none of those that Linux gives to programs which name none (from 32768), and that Ray gives to workers (10002 to
    19999): their gRPC servers share ports (SO_REUSEPORT), so that they would get some of the requests.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
