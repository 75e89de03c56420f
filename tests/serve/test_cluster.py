"""Endpoints on Ray Serve: several replicas, back-pressure, a killed replica, and the command from start to end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import requests

from hfbatch.serve.check import send_load
from hfbatch.serve.plan import make_plan
from hfbatch.serve.run import serving
from hfbatch.spec.serve import ServeSpec
from tests.programs import hfbatch_command

pytestmark = pytest.mark.timeout(240)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replicas() -> list[psutil.Process]:
    """The processes of this user that hold a model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ServeReplica" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def test_a_killed_replica_loses_no_request_without_an_error(ray_cluster: str, encoder: str) -> None:
    where = {"port": free_port(), "name": "vectors", "limits": {"ongoing": 8, "queued": 8}}
    workers = {"count": 2, "cpus": 0.4}
    spec = ServeSpec.build({"task": "embedding", "model": encoder, "serve": where, "workers": workers})
    rows = [{"text": f"text {k}"} for k in range(50)]
    with serving([make_plan(spec)], ray_cluster) as (url,):
        calm = asyncio.run(send_load("vectors", f"{url}/predict", rows, 8))
        assert calm.statuses == {200: 80}
        crowded = asyncio.run(send_load("vectors", f"{url}/predict", rows, 60))
        assert crowded.statuses == {200: 600}
        assert crowded.retries > 0  # more than both replicas and the queue take

        async def kill_under_load() -> Any:
            load = asyncio.create_task(send_load("vectors", f"{url}/predict", rows, 12))
            await asyncio.sleep(0.1)
            replicas()[0].kill()
            return await load

        lost = asyncio.run(kill_under_load())
        assert sum(lost.statuses.values()) == 120  # each has an answer
        assert set(lost.statuses) <= {200, 500, 503}
        assert lost.statuses[200] >= 100
        shown = requests.get(f"{url}/metrics", timeout=30).text
        assert 'hfbatch_requests_total{route="/predict",status="200"}' in shown
