"""An endpoint with the API of OpenAI, and jobs whose rows it answers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hfbatch import JobSpec
from hfbatch.errors import SpecError
from hfbatch.predict.plan import make_plan
from tests.jobs.tools import make_spec, write_shards


class Endpoint:
    """An endpoint with the API of OpenAI. `answer` may be replaced; it gets a text, the body and how often the text came."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.others: list[str] = []
        """Paths that are none of the API."""
        self.models: Any = {"data": [{"id": "some-model"}]}
        self.answer: Callable[[str, dict[str, Any], int], Any] = lambda text, body, times: text.upper()
        self.under_way = self.most_under_way = 0
        routes = [
            Route(path, self.post, methods=["POST"])
            for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
        ]
        others = Route("/{path:path}", self.get_other)
        app = Starlette(routes=[*routes, Route("/v1/models", self.list_models), others])
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=self._server.run, args=([listening],), daemon=True).start()

    async def list_models(self, request: Request) -> Response:
        return self.models if isinstance(self.models, Response) else JSONResponse(self.models)

    async def get_other(self, request: Request) -> Response:
        self.others.append(request.url.path)
        return JSONResponse({})

    async def post(self, request: Request) -> Response:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        await asyncio.sleep(0.005)
        self.under_way -= 1
        if "input" in body:
            return self._embed(body)
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        self.seen[text] += 1
        made = self.answer(text, body, self.seen[text])
        if not isinstance(made, str):
            return made
        choice = {"message": {"role": "assistant", "content": made}} if "messages" in body else {"text": made}
        usage = {
            "prompt_tokens": len(text),
            "completion_tokens": len(made),
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        return JSONResponse({"choices": [{**choice, "finish_reason": "stop"}], "usage": usage})

    def _embed(self, body: dict[str, Any]) -> Response:
        texts = body["input"]
        self.seen.update(texts)
        refused = [made for text in texts if not isinstance(made := self.answer(text, body, 1), str)]
        if refused:
            return refused[0]
        items = [{"index": k, "embedding": [len(text), 0.5, -1]} for k, text in enumerate(texts)]
        usage = {"prompt_tokens": sum(map(len, texts))}
        return JSONResponse({"data": items[::-1], "usage": usage})

    def stop(self) -> None:
        self._server.should_exit = True


def spec_of(
    endpoint: Endpoint, folder: Path, texts: list[Any], task: str = "text-generation", **sections: Any
) -> JobSpec:
    """A job over texts, in three shards; params are those of greedy text generation."""
    if not (folder / "in").exists():
        write_shards(folder / "in", texts)
    greedy = {"do_sample": False, "return_full_text": False} if task == "text-generation" else {}
    engine = {"name": "http", "url": f"{endpoint.url}/v1", **sections.pop("engine", {})}
    params = {**greedy, **sections.pop("params", {})}
    sections = {"rejects": {"max_fraction": 1.0}, "model": {"dtype": "auto"}, **sections}
    sections["input"] = {"split_rows": max(len(texts) // 3, 1), **sections.get("input", {})}
    return make_spec(
        task, "some-model", folder / "in", folder / "out", engine=engine, params=params, **sections
    )


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


def faults_with(endpoint: Endpoint, folder: Path, task: str = "text-generation", **sections: Any) -> str:
    with pytest.raises(SpecError) as found:
        make_plan(spec_of(endpoint, folder, ["a"], task, **sections))
    return str(found.value)
