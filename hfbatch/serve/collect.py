"""Collects the rows of several requests and has them answered together (dynamic batching). Does not import Ray.

`serve.batch` of Ray Serve made sets of one or two rows of a hundred concurrent requests, and answered a third of the rows
that these sets of up to 64 rows did in a second (MiniLM on two cores); it also runs within a replica only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from hfbatch.engines.base import DeviceLostError
from hfbatch.serve.app import OnToken
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.metrics import Metrics
from hfbatch.serve.rows import Answer, Row


class _AllHaveLeftError(BaseException):
    """No client waits for the rows of a set. Not an Exception, after which the rows would be tried one by one."""


@dataclass
class _Waiting:
    row: Row
    on_token: OnToken | None
    answer: asyncio.Future[Answer]
    since: float


class Collector:
    """Answers rows in sets: while the model runs one, the rows that arrive form the next.

    :param endpoint: answers a set; its spec bounds the rows of a set and the time that its first row waits for others.
    :param metrics: counts the sets.
    """

    def __init__(self, endpoint: Endpoint, metrics: Metrics) -> None:
        self._endpoint, self._metrics = endpoint, metrics
        self._rows, self._wait = endpoint.config.endpoint.rows, endpoint.config.endpoint.wait_ms / 1000
        # One thread: each that calls torch gets OpenMP threads of its own, which wait for work by spinning.
        self._thread = ThreadPoolExecutor(1, "hfbatch-model")
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[Answer]:
        """Has rows answered together with those of other requests, see `app.Ask`."""
        loop = asyncio.get_running_loop()
        mine = [_Waiting(row, on_token, loop.create_future(), loop.time()) for row in rows]
        self._waiting.extend(mine)
        self._arrived.set()
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._answer_all())
        return await asyncio.gather(*(one.answer for one in mine))

    async def _answer_all(self) -> None:
        while self._waiting:
            await self._wait_for_others()
            first = [self._waiting.popleft() for _ in range(min(self._rows, len(self._waiting)))]
            # The futures of a request whose client has left are cancelled.
            if together := [one for one in first if not one.answer.done()]:
                await self._answer(together)

    async def _wait_for_others(self) -> None:
        loop = asyncio.get_running_loop()
        until = self._waiting[0].since + self._wait
        while len(self._waiting) < self._rows and (left := until - loop.time()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    async def _answer(self, together: list[_Waiting]) -> None:
        self._metrics.together(len(together))
        loop = asyncio.get_running_loop()
        listeners = {place: one.on_token for place, one in enumerate(together) if one.on_token}

        def report(place: int, token: int) -> None:
            """Passes on a token from the thread that generates."""
            if all(one.answer.done() for one in together):
                raise _AllHaveLeftError
            if place in listeners:
                loop.call_soon_threadsafe(listeners[place], token)

        work = partial(self._endpoint.answer, [one.row for one in together], report if listeners else None)
        try:
            answers = await loop.run_in_executor(self._thread, work)
        except _AllHaveLeftError:
            return
        except DeviceLostError:
            os._exit(1)  # a new process gets a fresh device context; Ray Serve starts it
        except Exception as error:  # noqa: BLE001 - each of the requests reports it
            for one in together:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for one, answer in zip(together, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)
