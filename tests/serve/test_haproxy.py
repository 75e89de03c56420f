"""`serve.proxy: haproxy`: the same answers through HAProxy, which another user of the machine cannot administer."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from pathlib import Path

import psutil
import pytest
import requests

from hfbatch.engines.sending import free_port
from hfbatch.errors import SpecError
from hfbatch.serve.check import send_load
from hfbatch.serve.plan import make_plan
from hfbatch.serve.run import serving
from hfbatch.spec.job import ServeSpec
from tests.models.text import tiny_llama
from tests.programs import Program, hfbatch


def proxies(port: int) -> list[psutil.Process]:
    """The processes named haproxy that listen on a port of loopback."""
    found = [one for one in psutil.process_iter(["name"]) if one.info["name"] == "haproxy"]
    return [one for one in found if ("127.0.0.1", port) in {tuple(c.laddr) for c in one.net_connections()}]


@pytest.mark.timeout(180)
def test_an_endpoint_behind_haproxy(tmp_path: Path) -> None:
    port, model = free_port(), tiny_llama(tmp_path / "model")
    shared = Path("/tmp/haproxy-serve")
    before = {*shared.glob("*")}
    where = f"serve={{name: chat, port: {port}, proxy: haproxy, limits: {{body_bytes: 1000, ongoing: 2, queued: 2}}}}"
    flags = [
        "--address",
        "local",
        "--set",
        where,
        "--param",
        "do_sample=false",
        "--param",
        "max_new_tokens=8",
    ]
    program = Program(hfbatch, "serve", "text-generation", "--model", model, *flags)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while f"at {url}" not in program.output and time.monotonic() < deadline:
            assert program.poll() is None, program.output
            time.sleep(0.1)
        rows = {"rows": [{"text": "a cat sat on"}]}
        (row,) = requests.post(f"{url}/predict", json=rows, timeout=60).json()["rows"]
        body = {"model": "chat", "prompt": "a cat sat on", "stream": True}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=60) as streamed:
            lines = [line.removeprefix("data: ") for line in streamed.iter_lines(decode_unicode=True) if line]
        assert lines[-1] == "[DONE]"
        assert len(lines) > 2
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        assert row["generated_text"] == f"a cat sat on{text}"
        assert (
            requests.post(f"{url}/predict", json={"rows": [{"text": "x" * 2000}]}, timeout=60).status_code
            == 413
        )
        crowded = asyncio.run(send_load("chat", f"{url}/predict", [{"text": "a cat"}], 8, rounds=1))
        assert crowded.statuses == {200: 8}
        assert crowded.retries > 0
        (proxy,) = proxies(port)
        file = Path(proxy.cmdline()[proxy.cmdline().index("-f") + 1])
        private = next(parent for parent in file.parents if parent.name.startswith("hfbatch-p-"))
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        program.interrupt()
        assert program.wait(60) == 0, program.output
        assert not proxies(port)
        assert not private.exists()
        assert {*shared.glob("*")} == before
    finally:
        program.kill()


def test_a_cluster_that_runs_keeps_its_proxy(ray_cluster: str, encoder: str) -> None:
    values = {"task": "embedding", "model": encoder, "serve": {"proxy": "haproxy"}}
    with (
        pytest.raises(SpecError, match="for a cluster that this command starts"),
        serving([make_plan(ServeSpec.build(values))], ray_cluster),
    ):
        pass
