"""Requests of hostile and of careless clients get an answer or a named fault, and disturb nobody else."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import PIL.Image
import pytest
import requests

from hfbatch.serve.collect import Collector
from hfbatch.serve.gate import Gate
from hfbatch.serve.metrics import Metrics
from hfbatch.serve.rows import NO_FILE, Answer, Row
from hfbatch.spec.serve import EndpointSpec
from tests.models.text import tiny_llama
from tests.models.vision import tiny_vision
from tests.serve.conftest import Served
from tests.serve.test_app import client, faults, post
from tests.tasks.test_chat import TEMPLATE

HI = {"messages": [{"role": "user", "content": "Hi"}]}


def send(served: Served, body: bytes) -> requests.Response:
    headers = {"Content-Type": "application/json"}
    return requests.post(f"{served.url}/predict", body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"1" + b"0" * 400, 422),
        (b"1" + b"0" * 5000, 400),
        (b"1e999", 422),
        (b"NaN", 400),
        (b'"\\ud800"', 400),
        (b'"\xff"', 400),
        (b"[" * 150 + b"]" * 150, 422),
        (b'{"a": {}}', 422),
    ],
    ids=["long", "too-long", "infinite", "nan", "surrogate", "not-utf8", "deep", "object"],
)
def test_values_that_no_column_holds_are_faults_of_the_request(
    embedder: Served, value: bytes, status: int
) -> None:
    assert send(embedder, b'{"rows": [{"text": ' + value + b"}]}").status_code == status


def test_errors_do_not_send_back_what_a_client_has_sent(embedder: Served) -> None:
    long = "x" * 100_000
    for path, body in (
        ("/predict", {"rows": [{long: 1}]}),
        ("/v1/embeddings", {"input": "a", "model": long}),
    ):
        assert len(post(embedder, path, body).content) < 2000


def test_every_error_has_the_form_of_the_openai_api(embedder: Served) -> None:
    assert "/docs" in faults(post(embedder, "/v1/nothing", {}))
    assert post(embedder, "/health", {}).json()["error"]["code"] == 405
    asking = client(embedder)
    with pytest.raises(openai.BadRequestError):
        asking.embeddings.create(model="my-embedder", input=[1, 2])  # tokens
    with pytest.raises(openai.NotFoundError):
        asking.embeddings.create(model="gpt-4", input="a")


def test_an_unexpected_error_is_told_without_its_details(
    start: Callable[..., Served], encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start({"task": "embedding", "model": encoder})

    def broken(*_: Any) -> None:
        raise LookupError("/a/secret/path")

    monkeypatch.setattr(served.endpoint, "answer", broken)
    response = post(served, "/predict", {"rows": [{"text": "a"}]})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "LookupError" in faults(response)
    assert "secret" not in faults(response)


def raw(served: Served, request: bytes) -> bytes:
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request)
        return connection.recv(100).split(b"\r\n")[0]


def test_hosts_are_compared_as_names_are(embedder: Served) -> None:
    def status(host: bytes) -> bytes:
        return raw(embedder, b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").split()[1]

    assert [status(host) for host in (b"LocalHost:1", b"[::1]:8000", b"127.0.0.1")] == [b"200"] * 3
    assert [status(host) for host in (b"localhost.evil", b"127.0.0.1.evil:80", b"")] == [b"403"] * 3


def test_rows_name_no_files_and_learn_nothing_of_folders(
    start: Callable[..., Served], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "in/a.png")
    model = tiny_vision(tmp_path / "vit", "ViTForImageClassification", id2label={0: "cat", 1: "dog"})
    served = start({"task": "image-classification", "model": model, "input": str(tmp_path / "in")})
    inside = str(tmp_path / "in/a.png")
    names = [inside, "a.png", "../a.png", f"file://{inside}", "http://169.254.169.254/latest", "s3://a/b"]
    found = post(served, "/predict", {"rows": [{"image": name} for name in names]}).json()
    assert found["rows"] == [None] * len(names)
    assert {reject["message"] for reject in found["rejects"]} == {NO_FILE}
    encoded = base64.b64encode(Path(inside).read_bytes()).decode()
    rows = [{"image": f"data:image/png;base64,{encoded}"}]
    assert post(served, "/predict", {"rows": rows}).json()["rejects"] == []


def through_gate(endpoint: EndpointSpec, token: str | None = None, **scope: Any) -> list[dict[str, Any]]:
    """What the gate sends in answer to one connection, before an application that accepts all."""
    sent: list[dict[str, Any]] = []

    async def accepts(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")], **scope}
    asyncio.run(Gate(accepts, endpoint, token)(scope, None, keep))  # type: ignore[arg-type]
    return sent


def test_the_gate_knows_its_own_address_and_the_prefix_of_an_endpoint() -> None:
    def status(host: str = "127.0.0.1", **scope: Any) -> int:
        return through_gate(EndpointSpec(host=host), **scope)[0]["status"]

    assert status("127.0.0.2", headers=[(b"host", b"127.0.0.2:8000")]) == 200
    assert status("0:0::1", headers=[(b"host", b"[0:0::1]:8000")]) == 200
    assert status(headers=[(b"host", b"127.0.0.2:8000")]) == 403
    below = {"root_path": "/mood", "token": "0"}
    assert status(path="/mood/health", **below) == 200
    assert status(path="/mood/predict", **below) == 401
    assert (
        status(headers=[(b"host", b"localhost"), (b"content-length", b"\xb2")]) == 200
    )  # is a digit to Python
    assert through_gate(EndpointSpec(), type="websocket")[0]["type"] == "websocket.close"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 201}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 10**30}, "serve.limits.new_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]}, "has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has no text"),
    ],
)
def test_options_out_of_bounds_are_named(chat: Served, options: dict[str, Any], words: str) -> None:
    response = post(chat, "/v1/chat/completions", {**HI, **options})
    assert (response.status_code, words in faults(response)) == (400, True)


def text_of(served: Served, **options: Any) -> str:
    response = post(served, "/v1/chat/completions", {**HI, **options})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_a_temperature_near_zero_takes_the_most_probable_token(chat: Served) -> None:
    greedy = text_of(chat)
    assert text_of(chat, temperature=0, top_p=0.9) == greedy
    assert text_of(chat, temperature=1e-300) == greedy  # divided by it, logits are infinite
    assert text_of(chat, temperature=1, seed=10**4000)
    assert text_of(chat, temperature=1, seed=-1)


@pytest.fixture
def served_with(start: Callable[..., Served], tmp_path: Path) -> Callable[..., Served]:
    folder = tiny_llama(tmp_path, chat_template=TEMPLATE, max_position_embeddings=1024)
    return lambda **params: start(
        {"task": "text-generation", "model": folder, "params": {"max_new_tokens": 12, **params}}
    )


def test_options_of_the_spec_count_where_a_request_has_none(
    served_with: Callable[..., Served], chat: Served
) -> None:
    greedy = text_of(chat)
    several = served_with(do_sample=True, top_k=5, num_return_sequences=2)
    refused = post(several, "/v1/chat/completions", {**HI, "stream": True})
    assert "n=1" in faults(refused)
    assert text_of(several, temperature=0, n=1) == greedy  # top_k of the spec is without effect then
    beams = served_with(num_beams=2)
    assert "num_beams=1" in faults(post(beams, "/v1/chat/completions", {**HI, "stream": True}))
    stopped = served_with(do_sample=False, stop=[greedy[3:5]])
    assert text_of(stopped) == greedy[: greedy.index(greedy[3:5])]


def test_a_text_that_is_cut_at_a_stop_string_has_stopped(chat: Served) -> None:
    prompt = {"model": "chat", "prompt": "Tell me", "max_tokens": 20, "temperature": 1.8, "seed": 1}
    text = client(chat).completions.create(**prompt).choices[0].text
    stop = text[text.index("\ufffd") :][
        :2
    ]  # decoding alone makes this character: the search for tokens misses it
    whole = client(chat).completions.create(**prompt, stop=stop).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    events = list(client(chat).completions.create(**prompt, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in events) == whole.text
    assert events[-1].choices[0].finish_reason == "stop"


def test_nothing_is_generated_for_streams_that_all_clients_have_left(chat: Served) -> None:
    collector, seen = Collector(chat.endpoint, Metrics()), 0
    wanted = {"details": True, "return_full_text": False}

    def row(**params: Any) -> Row:
        text = chat.endpoint.with_params({**wanted, **params})
        return chat.endpoint.rows.read([{"text": "Every"}], text, "seed 1")[0]

    async def leave() -> list[Answer]:
        left = asyncio.Event()

        def take(token: int) -> None:
            nonlocal seen
            seen += 1
            left.set()

        asked = asyncio.ensure_future(collector([row(max_new_tokens=400, min_new_tokens=400)], take))
        await left.wait()
        asked.cancel()
        return await collector([row(max_new_tokens=2)])

    (answer,) = asyncio.run(leave())
    assert answer.value("new_tokens") == 2
    assert 0 < seen < 300


def test_a_stream_that_fails_says_so(
    served_with: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = served_with()

    def broken(*_: Any) -> None:
        raise LookupError("lost")

    monkeypatch.setattr(served.endpoint, "answer", broken)
    asked = client(served).completions.create(model=served.endpoint.task.model.name, prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="LookupError"):
        list(asked)
