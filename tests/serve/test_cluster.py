"""`hfbatch serve` on Ray Serve, from its start to its end: two replicas, back-pressure, and one that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
import traceback

import psutil
import pytest
import ray
import requests
from rich.console import Console

from hfbatch.engines.sending import free_port
from hfbatch.errors import SpecError, WorkerError
from hfbatch.serve.check import NO_ANSWER, Load, render, send_load
from hfbatch.serve.room import check_room
from hfbatch.serve.run import last_error
from hfbatch.spec.serve import EndpointSpec
from tests.programs import Program, hfbatch

ROWS = [{"text": f"text {k}"} for k in range(50)]


def replicas() -> list[psutil.Process]:
    """The processes that hold a model."""
    processes = psutil.process_iter(["cmdline"])
    return [one for one in processes if "ServeReplica:vectors" in " ".join(one.info["cmdline"] or [])]


def load(url: str, clients: int) -> Load:
    """Ten requests of each client."""
    return asyncio.run(send_load("vectors", f"{url}/predict", ROWS, clients))


async def load_and_kill(url: str) -> Load:
    """Kills a replica under load."""
    sent = asyncio.create_task(send_load("vectors", f"{url}/predict", ROWS, 12))
    await asyncio.sleep(0.1)
    replicas()[0].kill()
    return await sent


def refusal(port: int, paths: dict[str, str]) -> str:
    """Why there is no room for endpoints."""
    with pytest.raises(SpecError) as caught:
        check_room(EndpointSpec(port=port), paths)
    return str(caught.value)


def test_the_error_of_a_replica_is_shown_without_its_traceback() -> None:
    try:
        raise WorkerError("the weights lack\n1 layer")
    except WorkerError:
        trace = traceback.format_exc()
    message = f"The deployment failed to start 3 times in a row. Error:\n{trace}\n"
    assert last_error(message) == "hfbatch.errors.WorkerError: the weights lack 1 layer"
    assert last_error("Failed to update the deployments ['a'].") == "Failed to update the deployments ['a']."


def test_a_connection_that_ends_first_is_a_request_without_an_answer() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def run() -> Load:
        async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            return await send_load("vectors", f"http://{host}:{port}/predict", ROWS, 2)

    found = asyncio.run(run())
    assert found.statuses == {NO_ANSWER: 20}
    shown = Console(width=120, record=True)
    render([found], shown)
    assert "20 without an answer" in shown.export_text()


@pytest.mark.timeout(240)
def test_every_request_is_answered_or_fails_visibly(ray_cluster: str, encoder: str) -> None:
    port = free_port()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", port))
        busy.listen()
        assert "already in use" in refusal(port, {})
    where = f"{{name: vectors, port: {port}, limits: {{ongoing: 8, queued: 8}}}}"
    flags = ["--set", f"serve={where}", "--set", "workers={count: 2, cpus: 0.4}"]
    program = Program(hfbatch, "serve", "embedding", "--model", encoder, "--address", ray_cluster, *flags)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 100
    while f"at {url}" not in program.output and time.monotonic() < deadline:
        assert program.poll() is None, program.output
        time.sleep(0.1)
    try:
        assert f"at 127.0.0.1:{port}" in refusal(free_port(), {"other": "/other"})
        assert "vectors at / is served" in refusal(port, {"vectors": "/vectors"})
        assert "vectors at / is served" in refusal(port, {"other": "/"})
        assert load(url, 8).statuses == {200: 80}
        crowded = load(url, 60)
        assert crowded.statuses == {200: 600}
        assert crowded.retries > 0  # more requests than both replicas and the queue take
        lost = asyncio.run(load_and_kill(url))
        assert sum(lost.statuses.values()) == 120
        assert set(lost.statuses) <= {200, 500, 503}
        assert lost.statuses[200] >= 100
        shown = requests.get(f"{url}/metrics", timeout=30).text
        assert 'hfbatch_requests_total{route="/predict",status="200"}' in shown
        program.interrupt()
        assert program.wait(60) == 0, program.output
        assert not [one for one in ray.util.list_named_actors(all_namespaces=True) if "SERVE" in one["name"]]
    finally:
        if program.poll() is None:  # an endpoint that is left would take the CPUs of the tests after it
            program.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(60)
        program.kill()
