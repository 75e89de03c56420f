"""Endpoints in this process: the application of a replica behind a real HTTP server, without Ray."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from hfbatch.serve.app import build_app
from hfbatch.serve.collect import Collector
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.metrics import Metrics
from hfbatch.serve.plan import make_plan
from hfbatch.spec.job import ServeSpec
from tests.models.text import tiny_bert, tiny_bert_encoder, tiny_llama
from tests.tasks.test_chat import TEMPLATE


@dataclass
class Served:
    """An endpoint that answers."""

    url: str
    endpoint: Endpoint


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Served]]:
    """Starts an endpoint of a spec without its port."""
    servers: list[uvicorn.Server] = []

    def begin(values: dict[str, Any]) -> Served:
        endpoint = Endpoint(make_plan(ServeSpec.build(values)).config)
        metrics = Metrics()
        app = build_app(endpoint, Collector(endpoint, metrics), metrics)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)  # requests wait until the server accepts them
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()
        servers.append(server)
        return Served(f"http://127.0.0.1:{listening.getsockname()[1]}", endpoint)

    yield begin
    for server in servers:
        server.should_exit = True


@pytest.fixture(scope="session")
def embedder(start: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tiny_bert_encoder(tmp_path_factory.mktemp("served") / "my embedder!")
    return start({"task": "embedding", "model": folder})


@pytest.fixture(scope="session")
def classifier_of(start: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tiny_bert(tmp_path_factory.mktemp("served"), id2label={0: "bad", 1: "good"})
    limits = {"rows": 4, "body_bytes": 2000}
    return start(
        {"task": "text-classification", "model": folder, "serve": {"name": "mood", "limits": limits}}
    )


@pytest.fixture(scope="session")
def chat(start: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tiny_llama(
        tmp_path_factory.mktemp("served"), chat_template=TEMPLATE, max_position_embeddings=1024
    )
    params = {"max_new_tokens": 12, "do_sample": False}
    return start({"task": "text-generation", "model": folder, "params": params, "serve": {"name": "chat"}})
