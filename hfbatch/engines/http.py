"""The engine for models that somebody serves: an endpoint with the API of OpenAI answers the requests of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

from hfbatch.engines.base import CACHED, REMOTE, Call, EngineConfig, RowEngine, cached_count, token_count
from hfbatch.engines.sending import Sender, UnansweredError, as_answered, sender_of
from hfbatch.errors import HfbatchError, WorkerError, redact_text
from hfbatch.hub.served import read_token, token_hint
from hfbatch.spec.engines import HttpEngineSpec

FATAL = frozenset((404, 405))
"""States of HTTP that show that the endpoint has no such model or path, besides those that `sending` raises for."""
FULL = frozenset((429, 503))
"""States of HTTP of an endpoint without room, after all attempts."""
MOST_SHOWN = 300
"""Maximum of characters of an endpoint's message."""
MOST_READ = 10_000
"""Maximum of characters of an endpoint's message that are searched for secrets."""
KEPT_HINT = "committed results are kept, and the same command continues"
Answers = list[tuple[int, Any]]
"""Positions of requests, each with its answer or its error."""


class EndpointError(HfbatchError):
    """The endpoint refuses a request, or its answer holds no result; the row becomes a reject."""


class HttpEngine(RowEngine):
    """Sends calls to an endpoint. Loads nothing; the token is read from the environment of the worker.

    :raises WorkerError: if the environment holds no token that can be sent.
    """

    name = "http"
    rows = 32
    model = None

    def __init__(self, config: EngineConfig) -> None:
        self._spec = cast(HttpEngineSpec, config.options)
        try:
            self._token = read_token(self._spec)
        except ValueError as error:
            raise WorkerError(
                f"engine.token_env: {error} on a worker; set it on every node, for `ray job submit` in env_vars of "
                "--runtime-env-json"
            ) from None
        self.device, self.dtype = self._spec.url, REMOTE
        self._usage: Counter[str] = Counter()
        self._answers = False  # whether the endpoint has ever given a result

    @classmethod
    def option_faults(cls, model: Any, generation: Any, begin_with: str | None) -> list[str]:
        """Returns no errors: the task has checked its options, and the endpoint checks the others."""
        return []

    def take_usage(self) -> dict[str, int]:
        """Returns requests, prompt tokens and new tokens since the last call."""
        taken, self._usage = dict(self._usage), Counter()
        return taken

    def complete(
        self,
        requests: Sequence[Call],
        generation: None,
        rows: int,
        tokens: int | None = None,
        log_probs: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """Yields each answer as it comes. :param rows: maximum of concurrent requests.

        :raises WorkerError: if the endpoint cannot be reached, has no room, or would refuse all requests.
        """
        groups = _groups(requests, self._spec.texts_per_request)
        spec, hint = self._spec, token_hint(self._spec)
        with sender_of(
            spec.url, rows, self._token, spec.timeout, hint, KEPT_HINT, spec.requests_per_minute
        ) as (loop, sender):
            jobs = (self._ask(sender, requests, group) for group in groups)
            try:
                for answers in as_answered(loop, jobs, rows):
                    yield from answers
            finally:
                self._usage["requests"] += sender.sent

    async def _ask(self, sender: Sender, calls: Sequence[Call], group: list[int]) -> Answers:
        """Sends calls as one request, or each alone if the endpoint refuses them together."""
        first = calls[group[0]]
        joined = {} if first.text is None else {"input": [calls[place].text for place in group]}
        try:
            status, body = await sender.post(first.path, {**first.body, **joined}, first.path)
        except UnansweredError as error:
            if not self._answers or not await sender.is_there():
                raise
            status, body = 0, str(error)  # the fault is that of the rows, since others are answered
        if status in FATAL | FULL:
            raise WorkerError(
                f"the endpoint at {self._spec.url} answers {status}{_hint(status)}: {self._shown(_message(body))}"
            )
        if (status >= 400 or not status) and len(group) > 1:
            return [answer for place in group for answer in await self._ask(sender, calls, [place])]
        if status >= 300 or not status:
            said = f"the endpoint answers {status}: {self._shown(_message(body))}" if status else str(body)
            return [(group[0], EndpointError(said))]
        self._answers = True
        self._count(body)
        if not joined:
            return [(group[0], self._read(first, body))]
        return [
            (place, self._read(calls[place], body, (index, len(group)))) for index, place in enumerate(group)
        ]

    def _read(self, call: Call, body: object, place: tuple[int, int] | None = None) -> Any:
        """Returns what a call makes of its answer, or the error. :param place: see `_item`, where calls may share a body."""
        try:
            return call.read(_item(body, *place) if place else body)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            return EndpointError(f"the endpoint's answer holds no result: {self._shown(error)}")

    def _shown(self, value: object) -> str:
        """Returns a message of the endpoint as one line, cut and without the token, which it may repeat."""
        text = str(value)[:MOST_READ]
        text = redact_text(" ".join((text.replace(self._token, "***") if self._token else text).split()))
        return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"

    def _count(self, body: object) -> None:
        usage = body.get("usage") if isinstance(body, dict) else None
        for name, known_as in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "new_tokens")):
            self._usage[known_as] += token_count(usage, name) or 0
        if cached := cached_count(usage):
            self._usage[CACHED] += cached

    def is_out_of_memory(self, error: Exception) -> bool:
        """Never: nothing is computed here."""
        return False

    def release_memory(self) -> None:
        """Does nothing."""


def _groups(calls: Sequence[Call], most: int) -> Iterator[list[int]]:
    """Yields positions of calls that share a request: of those with texts at most so many, of the others each alone."""
    for alone, places in groupby(range(len(calls)), lambda place: calls[place].text is None):
        step, row = 1 if alone else most, list(places)
        yield from (row[start : start + step] for start in range(0, len(row), step))


def _item(body: object, index: int, inputs: int) -> object:
    """Returns the item of `data` for one of the inputs; items state their index, and may come in any order.

    The item of a single input may leave it out: of several, it would be a guess which one it is for.
    """
    data = body.get("data") if isinstance(body, dict) else None
    items = [one for one in data if isinstance(one, Mapping)] if isinstance(data, list) else []
    unstated = 0 if inputs == 1 else None
    found = [one for one in items if type(its := one.get("index", unstated)) is int and its == index]
    if len(found) != 1:
        raise ValueError(f"data has {len(found)} items with index {index}")
    return found[0]


def _message(body: object) -> object:
    """Returns the message of an error's body, which has several forms."""
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    return error.get("message", error) if isinstance(error, dict) else error


def _hint(status: int) -> str:
    """Returns what to do about a status that ends the job."""
    if status in FULL:
        return f" to every attempt; lower batch.size or set engine.requests_per_minute; {KEPT_HINT}"
    return "; check engine.url and model.name"
