"""What every request passes: the host that it names, its token, and the size of its body. Does not import Ray."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from hfbatch.serve.metrics import Metrics
from hfbatch.spec.serve import EndpointSpec

OPEN = frozenset(("/health", "/ready"))
"""Paths that need no token."""
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
MOST_LETTERS = 500
"""Maximum length of a sentence in an error: it may repeat what a request holds."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware that refuses requests before the application reads them.

    Without a token, requests have to name this machine as their host: a web page that is open in a browser here could
    otherwise ask under a name of its own (DNS rebinding).

    :param app: the application.
    :param endpoint: its limits.
    :param token: SHA-256 of the bearer token in hexadecimal; None if there is none.
    """

    def __init__(self, app: Any, endpoint: EndpointSpec, token: str | None) -> None:
        self._app, self._endpoint, self._token = app, endpoint, token

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "websocket":  # no route takes any, and none shall without its token
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        most = self._endpoint.limits.body_bytes
        if not self._local(headers.get(b"host", b"").decode("latin1")):
            await refuse(send, 403, ["the request names another host; use http://127.0.0.1 or localhost"])
        elif scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN and not self._known(
            headers.get(b"authorization", b"")
        ):
            await refuse(send, 401, ["send the endpoint's token as `Authorization: Bearer TOKEN`"])
        elif _length(headers.get(b"content-length", b"")) > most:
            await refuse(send, 413, [_too_large(most)])
        else:
            await self._app(scope, _bounded(receive, most), send)

    def _local(self, host: str) -> bool:
        known = {*LOCAL, self._endpoint.host_in_url}
        host = host.lower()
        return self._token is not None or host.rpartition(":")[0] in known or host in known

    def _known(self, header: bytes) -> bool:
        if self._token is None:
            return True
        kind, _, token = header.partition(b" ")
        found = hashlib.sha256(token.strip()).hexdigest()
        return kind.lower() == b"bearer" and hmac.compare_digest(found, self._token)


class Measured:
    """ASGI middleware that counts requests by route and status, and measures the time until the answer begins.

    :param app: a FastAPI application, which notes the route in the scope.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handles one connection."""
        begun = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.request(route, message["status"], time.perf_counter() - begun)
            await send(message)

        await self._app(scope, receive, measured)


def _length(header: bytes) -> int:
    """The length that a header claims. Servers refuse what is no number; the body is counted anyway."""
    return int(header) if header.isdigit() and len(header) < 20 else 0


class BodyTooLargeError(Exception):
    """A body without a length turned out to be larger than allowed."""


def _bounded(receive: Receive, most: int) -> Receive:
    """Counts the bytes of a body, whatever its header says."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise BodyTooLargeError(_too_large(most))
        return message

    return bounded


def _too_large(most: int) -> str:
    return f"the body has more than serve.limits.body_bytes={most:,} bytes; send fewer rows in a request"


def error_body(status: int, faults: Sequence[str]) -> dict[str, Any]:
    """The body of an error, in the form of the OpenAI API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    shown = (fault if len(fault) <= MOST_LETTERS else f"{fault[:MOST_LETTERS]}..." for fault in faults)
    return {"error": {"message": "; ".join(shown), "type": kind, "code": status, "param": None}}


async def refuse(send: Send, status: int, faults: Sequence[str]) -> None:
    """Sends an error."""
    body = json.dumps(error_body(status, faults)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
