"""Sends the requests of a batch file to an endpoint, and again where it has no room or does not answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable

import aiohttp

from hfbatch.errors import HfbatchError, WorkerError, one_line
from hfbatch.serve.batch_file import Answers, BatchFile, Line

AGAIN = frozenset((408, 409, 429, 500, 502, 503, 504))
"""States of HTTP after which a request is sent again."""
REFUSED = frozenset((401, 403))
"""States of HTTP that all requests would get."""
MOST_TRIES = 8
LONGEST_PAUSE_S = 60.0


async def send_batch(
    batch: BatchFile,
    answers: Answers,
    url: str,
    concurrent: int = 64,
    token: str | None = None,
    seconds: float = 600,
    on_answer: Callable[[int], None] = lambda status: None,
) -> None:
    """Sends the requests that have no answer yet.

    :param url: of the API, without /v1.
    :param concurrent: requests that are under way.
    :param token: sent as a bearer token.
    :param seconds: that a request may take.
    :param on_answer: called with the status of each answer.
    :raises WorkerError: if the endpoint cannot be reached, or refuses the token; the answers until then are kept.
    :raises SpecError: if the batch file has changed.
    """
    concurrent = min(concurrent, max(len(batch.ids) - len(answers.done), 1))
    lines = batch.lines(without=answers.done)
    timeout = aiohttp.ClientTimeout(total=seconds)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connector = aiohttp.TCPConnector(limit=concurrent)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session:

        async def client() -> None:
            """Sends one request after another."""
            for line in lines:  # shared with the other clients
                status, body = await _send(session, url, line)
                answers.add(line.custom_id, status, body)
                on_answer(status)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrent):
                    group.create_task(client())
        except* (HfbatchError, OSError) as group_error:  # the first stops the others
            raise group_error.exceptions[0] from group_error


async def _send(session: aiohttp.ClientSession, url: str, line: Line) -> tuple[int, object]:
    """Sends a request until it is answered; returns the status and the body.

    :raises WorkerError: if no attempt reaches the endpoint, or if no request would be answered.
    """
    for attempt in range(MOST_TRIES):
        last = attempt == MOST_TRIES - 1
        try:
            # A redirect would take the request to another host, or make it a GET.
            async with session.post(url + line.url, json=line.body, allow_redirects=False) as response:
                _check_status(response, url)
                if response.status not in AGAIN or last:
                    return response.status, await _body(response)
                pause = _asked(response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError) as error:
            if last:
                raise WorkerError(
                    f"the endpoint at {url} does not answer request {line.custom_id!r}: {one_line(error)}; "
                    "the answers until now are kept, and the same command asks for the others"
                ) from error
            pause = 0.0
        # Full jitter on exponential backoff, so that requests which failed together do not return together.
        await asyncio.sleep(max(pause, random.uniform(0, min(2.0**attempt, LONGEST_PAUSE_S))))  # noqa: S311 - no secret
    raise AssertionError("every attempt returns, raises or pauses")


def _check_status(response: aiohttp.ClientResponse, url: str) -> None:
    if 300 <= response.status < 400:
        to = response.headers.get("Location", "another place")
        raise WorkerError(f"the endpoint at {url} redirects requests to {to}; give the URL that answers them")
    if response.status in REFUSED:
        raise WorkerError(
            f"the endpoint at {url} answers {response.status}: set --token-env to the environment variable with its "
            "token; the answers until now are kept"
        )


async def _body(response: aiohttp.ClientResponse) -> object:
    """The body of an answer; NaN, which JSON does not have, is null.

    :raises aiohttp.ClientPayloadError: if it is not JSON, though the request has succeeded.
    """
    data = await response.read()
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
