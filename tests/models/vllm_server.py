"""Stands in for vLLM's server, in a process of its own: its flags, its paths and its answers, without a model.

A prompt is continued by its own tokens from the last to the first, then by the first token that ends a text. Some first tokens
stand for what can go wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REFUSED, NOT_FINITE, DEATH, SILENCE, CUT = 10, 11, 12, 13, 14
"""First tokens of a prompt: refused with 400; log-probabilities that are no numbers; ends the server, once; no answer."""


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Health and version."""
        self._send(200, {"version": "0.0-test"})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            return self._send(401, {"error": "Unauthorized"})
        prompt, most = body["prompt"], body["max_tokens"]
        with Path(given.record).open("a", encoding="utf8") as file:
            file.write(json.dumps(body) + "\n")
        if prompt[1] == REFUSED:
            return self._send(400, {"error": {"message": "this prompt is refused"}})
        if prompt[1] == DEATH and not Path(given.record + ".died").exists():
            Path(given.record + ".died").touch()
            print("Segmentation fault, of a kind", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt[1] == SILENCE:
            time.sleep(600)
        ends = body.get("stop_token_ids", [])[:1]
        tokens = [*prompt[::-1], *ends][:most]
        log_probs = [float("nan") if prompt[1] == NOT_FINITE else -float(token) for token in tokens]
        choice = {
            "token_ids": tokens[: -1 if prompt[1] == CUT else None],
            "logprobs": {"token_logprobs": log_probs},
            "finish_reason": "stop" if tokens[-1:] == ends else "length",
        }
        usage = {"prompt_tokens_details": {"cached_tokens": 1}}
        return self._send(200, {"choices": [choice], "usage": usage})

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("--port", type=int)
    parser.add_argument("--record")
    given, rest = parser.parse_known_args()
    if "--fails" in rest:
        sys.exit("ValueError: the model class SomeModel is not supported")
    Path(given.record + ".pid").write_text(str(os.getpid()))
    Path(given.record + ".flags").write_text(json.dumps(rest))
    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()
