"""A small Hugging Face Hub on loopback: creates repositories, takes commits, remembers both."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """What the server has been asked for."""

    url: str
    readable_only: bool = False
    """Whether tokens may not write."""
    calls: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        hub.calls.append(f"{self.command} {path}")
        # The library also asks a hub, without a token, for what concerns no repository.
        if path == "/api/repos/create" or "/org/model" in path:
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.readable_only and ("auth-check" in path or "/commit/" in path):
            return self._send(403, {"error": "you may not write here"})
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self._send(200, {"url": f"{hub.url}/org/model", "id": "1"})
        if "/preupload/" in path:
            files = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            return self._send(200, {"files": [{**one, "shouldIgnore": False} for one in files]})
        if "/commit/" in path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    hub.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            url = f"{hub.url}/org/model/commit/{'0' * 40}"
            return self._send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url})
        return self._send(
            200, {"id": "org/model", "sha": "0" * 40, "siblings": [], "warnings": [], "errors": []}
        )

    def _send(self, code: int, values: dict[str, Any]) -> None:
        data = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing on stderr."""
