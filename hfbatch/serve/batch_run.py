"""Sends the requests of a batch file to an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hfbatch.engines.sending import Sender, connected
from hfbatch.errors import HfbatchError
from hfbatch.serve.batch_file import Answers, BatchFile

REFUSED_HINT = "set --token-env to the environment variable with its token"
KEPT_HINT = "the answers until now are kept, and the same command asks for the others"


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
    async with connected(concurrent, token, seconds) as session:
        sender = Sender(session, url, REFUSED_HINT, KEPT_HINT)

        async def client() -> None:
            """Sends one request after another."""
            for line in lines:  # shared with the other clients
                status, body = await sender.post(line.url, line.body, line.custom_id)
                answers.add(line.custom_id, status, body)
                on_answer(status)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrent):
                    group.create_task(client())
        except* (HfbatchError, OSError) as group_error:  # the first stops the others
            raise group_error.exceptions[0] from group_error
