"""An endpoint gives the answers of a job, to plain HTTP and to the OpenAI client, and refuses the rest by name."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import openai
import pyarrow as pa
import pytest
import requests

from hfbatch.errors import SpecError
from hfbatch.runtime.runner import Runner
from tests.serve.conftest import Served

TEXTS = ["a cat", "two dogs on a mat", "", "the end of the very long story about a cat and two dogs"]


def post(served: Served, path: str, body: Any, **headers: str) -> requests.Response:
    return requests.post(served.url + path, json=body, headers=headers, timeout=60)


def faults(response: requests.Response) -> str:
    return response.json()["error"]["message"]


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def of_job(
    served: Served, params: dict[str, Any] | None = None, **columns: list[Any]
) -> dict[str, list[Any]]:
    """What a job's runner gives for the same rows."""
    runner = Runner(served.endpoint.config.runner).with_params(params or {})
    done = runner.run({name: pa.array(values) for name, values in columns.items()})
    assert not done.rejects
    return {name: array.to_pylist() for name, array in done.columns.items()}


def test_answers_equal_those_of_a_job(embedder: Served, classifier_of: Served) -> None:
    found = post(embedder, "/predict", {"rows": [{"text": text} for text in TEXTS]}).json()
    assert found["rejects"] == []
    vectors = [row["embedding"] for row in found["rows"]]
    np.testing.assert_allclose(vectors, of_job(embedder, text=TEXTS)["embedding"], atol=1e-5)
    labels = post(classifier_of, "/predict", {"rows": [{"text": text} for text in TEXTS]}).json()["rows"]
    wanted = of_job(classifier_of, text=TEXTS)
    assert [row["label"] for row in labels] == wanted["label"]
    np.testing.assert_allclose([row["score"] for row in labels], wanted["score"], atol=1e-5)


def test_a_bad_row_is_rejected_and_the_others_are_answered(embedder: Served) -> None:
    found = post(embedder, "/predict", {"rows": [{"text": "a"}, {"text": None}, {"text": "b"}]}).json()
    assert [row is None for row in found["rows"]] == [False, True, False]
    assert found["rejects"] == [
        {"row": 1, "stage": "preprocess", "error": "NullInput", "message": "text is null"}
    ]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"rows": [{"txt": "a"}]}, 422, ["'txt'", "no row has 'text'"]),
        ({"rows": [{"text": 3}]}, 422, ["'text' is int64", "string"]),
        ({"rows": [{"text": "a"}, {"text": 3}]}, 422, ["no common type"]),
        ({"rows": ["a"]}, 422, ["rows[0] is not an object"]),
        ({"rows": [{"text": "a"}], "params": {}}, 422, ["and nothing else"]),
        ({"rows": [{"text": "a"}] * 5}, 413, ["serve.limits.rows=4"]),
        ({"rows": [{"text": "a" * 3000}]}, 413, ["serve.limits.body_bytes=2,000"]),
        ([], 422, ["and nothing else"]),
    ],
)
def test_requests_that_cannot_be_answered_name_the_fault(
    classifier_of: Served, body: Any, status: int, words: list[str]
) -> None:
    response = post(classifier_of, "/predict", body)
    assert response.status_code == status
    assert all(word in faults(response) for word in words), faults(response)


def test_bodies_that_are_not_json_are_refused(embedder: Served) -> None:
    def send(body: bytes, kind: str) -> int:
        headers = {"Content-Type": kind}
        return requests.post(f"{embedder.url}/predict", body, headers=headers, timeout=60).status_code

    assert send(b'{"rows": [', "application/json") == 400
    assert send(b"[" * 100_000, "application/json") == 400
    assert send(b'{"rows": []}', "text/plain") == 415  # what a form of another web page can send
    assert send(b'{"rows": []}', "application/json") == 200


def test_a_body_without_a_length_is_bounded_too(classifier_of: Served) -> None:
    chunks = (b" " * 100 for _ in range(100))
    headers = {"Content-Type": "application/json"}
    response = requests.post(f"{classifier_of.url}/predict", chunks, headers=headers, timeout=60)
    assert response.status_code == 413


def test_other_names_of_this_machine_are_refused(embedder: Served) -> None:
    rebound = requests.get(f"{embedder.url}/v1/models", headers={"Host": "evil.example:8000"}, timeout=60)
    assert rebound.status_code == 403


def test_a_token_is_asked_for(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    monkeypatch.setenv("ENDPOINT_TOKEN", "0123456789abcdef")
    served = start({"task": "embedding", "model": encoder, "serve": {"token_env": "ENDPOINT_TOKEN"}})
    assert "0123456789abcdef" not in served.endpoint.config.to_json()
    body = {"rows": [{"text": "a"}]}
    assert post(served, "/predict", body).status_code == 401
    assert post(served, "/predict", body, Authorization="Bearer 0123456789abcdeg").status_code == 401
    assert post(served, "/predict", body, Authorization="Bearer 0123456789abcdef").status_code == 200
    assert requests.get(f"{served.url}/health", timeout=60).status_code == 200
    assert requests.get(f"{served.url}/metrics", timeout=60).status_code == 401


def test_requests_at_the_same_time_are_answered_together(start: Callable[..., Served], encoder: str) -> None:
    served = start({"task": "embedding", "model": encoder, "serve": {"wait_ms": 200}})

    async def ask() -> list[Any]:
        async with aiohttp.ClientSession() as session:

            async def one(text: str) -> Any:
                async with session.post(f"{served.url}/predict", json={"rows": [{"text": text}]}) as response:
                    return (await response.json())["rows"][0]["embedding"]

            return await asyncio.gather(*(one(f"text {k}") for k in range(32)))

    vectors = asyncio.run(ask())
    wanted = of_job(served, text=[f"text {k}" for k in range(32)])["embedding"]
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)
    shown = requests.get(f"{served.url}/metrics", timeout=60).text
    numbers = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
    assert float(numbers["hfbatch_rows_total"]) == 32
    assert float(numbers["hfbatch_rows_together_count"]) < 8
    assert float(numbers['hfbatch_requests_total{route="/predict",status="200"}']) == 32


def test_the_openai_client_gets_embeddings(embedder: Served) -> None:
    made = client(embedder).embeddings.create(model="my-embedder", input=TEXTS)
    wanted = of_job(embedder, text=TEXTS)["embedding"]
    np.testing.assert_allclose([item.embedding for item in made.data], wanted, atol=1e-5)
    tokens = sum(len(ids) for ids in embedder.endpoint.task.tokenizer(TEXTS)["input_ids"])
    assert made.usage.prompt_tokens == tokens
    body = {"input": "a cat", "encoding_format": "base64"}
    encoded = post(embedder, "/v1/embeddings", body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded), "<f4"), wanted[0], atol=1e-5)
    assert [model.id for model in client(embedder).models.list()] == ["my-embedder"]
    assert client(embedder).models.retrieve("my-embedder").id == "my-embedder"


def test_vectors_that_the_openai_api_cannot_hold_are_answered_by_predict_alone(
    start: Callable[..., Served], embedder: Served
) -> None:
    spec = {"task": "embedding", "model": embedder.endpoint.task.model.folder}
    halves = start({**spec, "params": {"precision": "float16", "windows": {"size": 8, "pool": "none"}}})
    assert post(halves, "/v1/embeddings", {"input": "a cat"}).status_code == 404
    found = post(halves, "/predict", {"rows": [{"text": TEXTS[3]}]}).json()["rows"][0]
    wanted = of_job(halves, text=TEXTS[3:])
    np.testing.assert_allclose(found["embedding"], wanted["embedding"][0], atol=1e-3)
    assert found["spans"] == wanted["spans"][0]
    with pytest.raises(SpecError, match=r"rows of a job, which an endpoint does not have"):
        start({**spec, "params": {"precision": "int8"}})


def test_the_openai_client_gets_answers_to_chats(chat: Served) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    made = client(chat).chat.completions.create(model="chat", messages=messages, max_tokens=8)
    params = {"max_new_tokens": 8, "return_full_text": False, "details": True}
    wanted = of_job(chat, params, messages=[messages])
    assert made.choices[0].message.content == wanted["generated_text"][0]
    assert made.choices[0].finish_reason == wanted["finish_reason"][0]
    assert made.usage.completion_tokens == wanted["new_tokens"][0]
    assert made.usage.prompt_tokens == wanted["prompt_tokens"][0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]
    again = client(chat).chat.completions.create(model="chat", messages=parts, max_completion_tokens=8)
    assert again.choices[0].message.content == made.choices[0].message.content


def test_a_stream_holds_the_text_of_the_whole_answer(chat: Served) -> None:
    messages = [{"role": "user", "content": "Tell me"}]
    options: dict[str, Any] = {"model": "chat", "messages": messages, "max_tokens": 20}
    whole = client(chat).chat.completions.create(**options)
    events = list(
        client(chat).chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    pieces = [event.choices[0].delta.content for event in events if event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 3
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_stop_strings_end_texts_and_are_left_out(chat: Served) -> None:
    prompt = {"model": "chat", "prompt": "Every large", "max_tokens": 20}
    text = client(chat).completions.create(**prompt).choices[0].text
    stop = text[3:6]
    cut = client(chat).completions.create(**prompt, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    events = client(chat).completions.create(**prompt, stop=stop, stream=True)
    assert "".join(event.choices[0].text for event in events) == text[: text.index(stop)]


def test_sampling_repeats_with_a_seed_whatever_runs_beside(chat: Served) -> None:
    options = {"model": "chat", "prompt": "Every", "temperature": 1.5, "max_tokens": 12}

    async def ask(seeds: list[int | None]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{chat.url}/v1", api_key="none") as asking:
            made = await asyncio.gather(*(asking.completions.create(**options, seed=seed) for seed in seeds))
            return [one.choices[0].text for one in made]

    alone = asyncio.run(ask([7]))
    beside = asyncio.run(ask([1, 2, 7, None, None]))
    assert beside[2] == alone[0]
    assert len(set(beside)) == 5
    several = client(chat).completions.create(**options, n=3, seed=7)
    assert len({choice.text for choice in several.choices}) == 3


def test_a_response_format_constrains_the_answer(chat: Served) -> None:
    properties = {
        "label": {"enum": ["good", "bad"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    }
    schema = {"type": "object", "properties": properties, "required": ["label", "stars"]}
    made = client(chat).chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "Rate it"}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "rating", "schema": schema}},
    )
    found = json.loads(made.choices[0].message.content)
    assert found["label"] in ("good", "bad")
    assert 1 <= found["stars"] <= 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [{"type": "function"}]}, "'tools'"),
        ({"frequency_penalty": 0.5}, "'frequency_penalty'"),
        ({"logprobs": True}, "'logprobs'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "constraint"),
        ({"something": 1}, "'something'"),
        ({"max_tokens": 5000}, "serve.limits.new_tokens=1024"),
        ({"n": 50}, "serve.limits.texts=8"),
        ({"n": 2, "stream": True}, "n=1"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 1023}, "max_new_tokens=1023"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"model": "gpt-4"}, "'gpt-4' is not served here; use 'chat'"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(chat: Served, options: dict[str, Any], words: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **options}
    response = post(chat, "/v1/chat/completions", body)
    assert response.status_code in (400, 404, 422)
    assert words in faults(response)


def test_options_without_effect_are_taken(chat: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "user": "me", "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "stop": None,
    }  # fmt: skip
    assert post(chat, "/v1/chat/completions", body).status_code == 200


def test_a_template_renders_the_columns_of_a_row(start: Callable[..., Served], encoder: str) -> None:
    params = {"template": "{{ title }}: {{ body | upper }}"}
    served = start({"task": "embedding", "model": encoder, "params": params})
    rows = [{"title": "a cat", "body": "sat"}, {"title": "a dog", "body": None}]
    found = post(served, "/predict", {"rows": rows}).json()
    runner = Runner(served.endpoint.config.runner).with_params({"template": None})
    wanted = runner.run({"text": pa.array(["a cat: SAT"])}).columns["embedding"].to_pylist()
    np.testing.assert_allclose(found["rows"][0]["embedding"], wanted[0], atol=1e-5)
    assert [(reject["row"], reject["message"]) for reject in found["rejects"]] == [(1, "column body is null")]
    assert "no row has 'body'" in faults(post(served, "/predict", {"rows": [{"title": "a"}]}))
    assert post(served, "/v1/embeddings", {"input": "a"}).status_code == 404


def test_openapi_describes_the_rows_of_the_task(classifier_of: Served, chat: Served) -> None:
    paths = requests.get(f"{classifier_of.url}/openapi.json", timeout=60).json()["paths"]
    content = paths["/predict"]["post"]["requestBody"]["content"]["application/json"]
    row = content["schema"]["properties"]["rows"]["items"]
    assert "text" in row["properties"]
    assert "/v1/chat/completions" not in paths
    assert "/v1/chat/completions" in requests.get(f"{chat.url}/openapi.json", timeout=60).json()["paths"]
    assert json.dumps(paths)
