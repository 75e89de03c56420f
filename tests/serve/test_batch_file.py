"""Batch files of the OpenAI API are answered exactly once, through crashes and endpoints that have no room."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.jobs.tools import call
from tests.programs import Program, hfbatch
from tests.serve.conftest import Served
from tests.serve.test_app import of_job


def write(path: Path, bodies: list[dict[str, Any]], url: str = "/v1/embeddings") -> Path:
    lines = [
        {"custom_id": f"row-{k}", "method": "POST", "url": url, "body": body} for k, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_each_request_has_its_answer_in_the_order_of_the_file(embedder: Served, tmp_path: Path) -> None:
    texts = [f"text {k}" for k in range(20)]
    bodies: list[dict[str, Any]] = [{"model": "my-embedder", "input": text} for text in texts]
    bodies.insert(5, {"model": "my-embedder", "input": ["a"], "dimensions": 3})
    source, target = write(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    done = call("run-batch", "-i", str(source), "-o", str(target), "--url", embedder.url, "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout) == {"requests": 21, "answered": 20, "failed": 1, "output": str(target)}
    found = read(target)
    assert [line["custom_id"] for line in found] == [f"row-{k}" for k in range(21)]
    assert found[5]["response"]["status_code"] == 400
    assert "'dimensions'" in found.pop(5)["response"]["body"]["error"]["message"]
    vectors = [line["response"]["body"]["data"][0]["embedding"] for line in found]
    np.testing.assert_allclose(vectors, of_job(embedder, text=texts)["embedding"], atol=1e-5)
    assert not (tmp_path / "out.jsonl.partial").exists()
    again = call("run-batch", "-i", str(source), "-o", str(target), "--url", embedder.url)
    assert (again.exit_code, "--overwrite" in again.stderr) == (2, True)


class Flaky:
    """An endpoint that first refuses each request: without room, by an error, or by closing the connection."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seen: Counter[str] = Counter()
        self._seconds = seconds
        app = Starlette(routes=[Route("/v1/completions", self.answer, methods=["POST"])])
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(128)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._server.run, args=([self._listening],), daemon=True).start()

    async def answer(self, request: Request) -> Response:
        prompt = (await request.json())["prompt"]
        self.seen[prompt] += 1
        time.sleep(self._seconds)
        if self.seen[prompt] == 1 and not self._seconds:
            headers = {"Retry-After": "0"}
            return Response("busy", [429, 500, 503][int(prompt) % 3], headers)
        return JSONResponse({"text": prompt})

    def stop(self) -> None:
        self._server.should_exit = True


@pytest.fixture
def slow() -> Iterator[Flaky]:
    server = Flaky(seconds=0.02)
    yield server
    server.stop()


def test_requests_that_find_no_room_are_sent_again(tmp_path: Path) -> None:
    server = Flaky()
    source = write(tmp_path / "in.jsonl", [{"prompt": str(k)} for k in range(12)], "/v1/completions")
    target = tmp_path / "out.jsonl"
    assert call("run-batch", "-i", str(source), "-o", str(target), "--url", f"{server.url}/v1").exit_code == 0
    assert [line["response"]["body"]["text"] for line in read(target)] == [str(k) for k in range(12)]
    assert set(server.seen.values()) == {2}
    server.stop()


def test_a_killed_run_is_resumed_and_asks_for_the_rest_only(
    slow: Flaky, tmp_path: Path, forked: None
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": str(k)} for k in range(100)], "/v1/completions")
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial/answers.jsonl"
    flags = ["-i", str(source), "-o", str(target), "--url", slow.url, "--concurrent", "2"]
    program = Program(hfbatch, "run-batch", *flags)
    while not partial.exists() or len(partial.read_bytes().splitlines()) < 20:
        assert program.poll() is None, program.output
        time.sleep(0.02)
    held = call("run-batch", *flags)
    assert (held.exit_code, "another process writes" in held.stderr) == (1, True)
    program.kill()
    program.wait(20)
    with partial.open("ab") as file:
        file.write(b'{"custom_id": "row-99", "resp')  # what a crash within a line leaves
    before = sum(slow.seen.values())
    kept = len(partial.read_bytes().splitlines()) - 1
    other = call("run-batch", *flags[:4], "--url", "http://127.0.0.1:1")
    assert (other.exit_code, "url differ" in other.stderr) == (2, True)
    assert call("run-batch", *flags).exit_code == 0
    assert [line["response"]["body"]["text"] for line in read(target)] == [str(k) for k in range(100)]
    assert sum(slow.seen.values()) - before == 100 - kept


def test_an_endpoint_that_is_not_there_is_an_error_that_names_the_rerun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.engines.sending.MOST_TRIES", 2)
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}], "/v1/completions")
    flags = ["-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:1"]
    done = call("run-batch", *flags)
    assert (done.exit_code, "the same command" in " ".join(done.stderr.split())) == (1, True)


def test_all_faults_of_a_file_are_reported_with_their_lines(tmp_path: Path) -> None:
    good = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}
    lines = [
        good, good, {**good, "custom_id": 3}, {**good, "custom_id": "b", "url": "/v1/images"},
        {**good, "custom_id": "c", "body": {"stream": True}},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + "\nnot json\n[1]\n"
    (tmp_path / "in.jsonl").write_text(text, encoding="utf8")
    done = call("run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-m", "m")
    shown = " ".join(done.stderr.split())
    assert done.exit_code == 2
    for words in (
        "line 2",
        "that of line 1 too",
        "line 3",
        "line 4",
        "/v1/images",
        "line 5",
        "stream",
        "and 1 more",
    ):
        assert words in shown
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("url", "model", "fix"),
    [
        ("/v1/embeddings", "gpt-4", "--set serve.name=gpt-4"),
        ("/v1/completions", None, "does not support text-generation"),
    ],
)
def test_a_model_that_does_not_fit_the_requests_is_refused(
    encoder: str, tmp_path: Path, url: str, model: str | None, fix: str
) -> None:
    body = {"input": "a"} if "embeddings" in url else {"prompt": "a"}
    source = write(tmp_path / "in.jsonl", [{**body, "model": model}], url)
    done = call("run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", encoder)
    assert done.exit_code == 2
    assert fix in " ".join(done.stderr.split())
