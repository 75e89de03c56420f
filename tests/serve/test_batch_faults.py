"""Batch files, outputs and endpoints that are not as they should be: nothing is lost, and the fault is named."""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from hfbatch.errors import SpecError
from hfbatch.serve.batch_file import open_batch
from tests.jobs.tools import call
from tests.serve.test_batch_file import read, write

OK = b'{"text": "yes"}'


@dataclass
class Fixed:
    """An endpoint that gives one answer to all."""

    url: str = ""
    status: int = 200
    body: bytes = OK
    headers: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def server() -> Iterator[Fixed]:
    fixed = Fixed()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            fixed.paths.append(self.path)
            self.send_response(fixed.status)
            for name, value in fixed.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(fixed.body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        fixed.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield fixed
        listening.shutdown()


@pytest.fixture
def fixed(server: Fixed, monkeypatch: pytest.MonkeyPatch) -> Fixed:
    monkeypatch.setattr("hfbatch.engines.sending.MOST_TRIES", 1)
    server.status, server.body, server.headers, server.paths = 200, OK, {}, []
    return server


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [{"prompt": str(k)} for k in range(3)], "/v1/completions")


def run(source: Path, target: Path, url: str, *flags: str) -> Result:
    return call("run-batch", "-i", str(source), "-o", str(target), "--url", url, "--concurrent", "1", *flags)


def bodies(target: Path) -> list[Any]:
    return [line["response"]["body"] for line in read(target)]


@pytest.mark.parametrize(
    ("status", "body", "headers", "words"),
    [
        (307, b"", {"Location": "http://elsewhere/v1"}, "redirects requests to http://elsewhere/v1"),
        (302, b"", {"Location": "/login"}, "redirects"),
        (401, b"{}", {}, "--token-env"),
        (403, b"{}", {}, "--token-env"),
        (200, b"<html>", {}, "which is not JSON"),
        (200, b'{"text": "\xff"}', {}, "which is not JSON"),
        (200, b"[" * 100_000, {}, "which is not JSON"),
    ],
    ids=["redirect", "login", "no-token", "forbidden", "html", "not-utf8", "deep"],
)
def test_what_no_request_would_pass_ends_the_run(
    fixed: Fixed, source: Path, tmp_path: Path, status: int, body: bytes, headers: dict[str, str], words: str
) -> None:
    fixed.status, fixed.body, fixed.headers = status, body, headers
    done = run(source, tmp_path / "out.jsonl", fixed.url)
    assert (done.exit_code, words in " ".join(done.stderr.split())) == (1, True), done.stderr
    assert len(fixed.paths) == 1
    fixed.status, fixed.body, fixed.headers = 200, OK, {}
    assert run(source, tmp_path / "out.jsonl", fixed.url).exit_code == 0
    assert bodies(tmp_path / "out.jsonl") == [{"text": "yes"}] * 3


def test_answers_that_json_does_not_have_are_written_as_json(
    fixed: Fixed, source: Path, tmp_path: Path
) -> None:
    fixed.body = b'{"text": "\\ud800 \xc3\xa9", "score": NaN}'
    assert run(source, tmp_path / "out.jsonl", fixed.url).exit_code == 0
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf8")
    assert bodies(tmp_path / "out.jsonl")[0] == {"text": "\ud800 é", "score": None}


def test_a_pause_that_is_no_number_is_not_slept(
    fixed: Fixed, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.engines.sending.MOST_TRIES", 2)
    monkeypatch.setattr("hfbatch.engines.sending.LONGEST_PAUSE_S", 0.01)
    for pause in ("nan", "-1", "1e999", "Wed, 21 Oct 2015 07:28:00 GMT"):
        fixed.status, fixed.headers = 429, {"Retry-After": pause}
        assert run(source, tmp_path / "out.jsonl", fixed.url, "--overwrite").exit_code == 3
    assert len(fixed.paths) == 4 * 3 * 2


def test_flags_without_effect_and_a_missing_token_are_refused(
    fixed: Fixed, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    done = run(source, target, "localhost:8000", "--param", "a=1", "--token-env", "NOT_SET_AT_ALL")
    shown = " ".join(done.stderr.split())
    assert done.exit_code == 2
    assert all(
        words in shown for words in ("--param has no effect", "begin with http://", "NOT_SET_AT_ALL is not")
    )


def test_an_output_that_cannot_be_replaced_is_refused_before_the_first_request(
    fixed: Fixed, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(source)
    before = source.read_bytes()
    for target, words in (
        (source, "batch file itself"),
        (tmp_path / "link.jsonl", "batch file itself"),
        (tmp_path / "folder", "is a folder"),
    ):
        done = run(source, target, fixed.url, "--overwrite")
        assert (done.exit_code, words in " ".join(done.stderr.split())) == (2, True)
    assert source.read_bytes() == before
    assert not fixed.paths


def test_files_of_other_systems_are_read(fixed: Fixed, tmp_path: Path) -> None:
    def line(name: str) -> bytes:
        values = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {}}
        return json.dumps(values).encode()

    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + line("a") + b"\r\n\r\n" + line("é"))
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fixed.url).exit_code == 0
    assert [answer["custom_id"] for answer in read(tmp_path / "out.jsonl")] == ["a", "é"]
    (tmp_path / "in.jsonl").write_bytes(line("\ud800"))
    done = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fixed.url, "--overwrite")
    assert (done.exit_code, "surrogate" in done.stderr) == (2, True)


def test_a_batch_file_that_changes_meanwhile_is_noticed(source: Path) -> None:
    batch = open_batch(source)
    assert len(list(batch.lines())) == 3
    source.write_text(source.read_text(encoding="utf8").replace('"2"', '"x"'), encoding="utf8")
    with pytest.raises(SpecError, match="has changed"):
        list(batch.lines())


def test_a_run_without_answers_binds_nobody_and_a_crash_while_overwriting_is_resumed(
    fixed: Fixed, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    assert run(source, target, "http://127.0.0.1:1").exit_code == 1  # mistyped
    assert run(source, target, fixed.url).exit_code == 0
    fixed.status = 401
    assert run(source, target, fixed.url, "--overwrite").exit_code == 1
    kept = tmp_path / "out.jsonl.partial/answers.jsonl"
    kept.write_text(target.read_text(encoding="utf8").splitlines()[0] + "\n\0\0\0\n", encoding="utf8")
    fixed.status, fixed.paths = 200, []
    assert run(source, target, fixed.url, "--overwrite").exit_code == 0
    assert (len(fixed.paths), len(read(target))) == (2, 3)


def test_a_full_disk_stops_the_run_and_the_rest_is_answered_later(
    fixed: Fixed, source: Path, tmp_path: Path
) -> None:
    fixed.body = json.dumps({"text": "a" * 1000}).encode()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        done = run(source, tmp_path / "out.jsonl", fixed.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (done.exit_code, "File too large" in done.stderr) == (1, True)
    fixed.paths = []
    assert run(source, tmp_path / "out.jsonl", fixed.url).exit_code == 0
    assert len(fixed.paths) == 1
    assert bodies(tmp_path / "out.jsonl") == [{"text": "a" * 1000}] * 3


@pytest.mark.parametrize("name", [["a"], {}, "org/model"])
def test_other_names_of_the_model_are_refused(encoder: str, tmp_path: Path, name: Any) -> None:
    source = write(tmp_path / "in.jsonl", [{"input": "a", "model": name}])
    done = call("run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--model", encoder)
    assert (done.exit_code, "leave `model` out" in " ".join(done.stderr.split())) == (2, True), done.stderr
