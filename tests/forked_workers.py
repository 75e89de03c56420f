"""Starts the Ray workers of tests as forks of one process that has imported what they need.

Ray starts a Python interpreter for each worker. There, the imports of Ray, torch and transformers take five to eight
seconds of a core, longer than the work of most tests. Everything else is Ray's own: `worker` passes the command line,
the environment and the streams that the raylet gave it to a forked process, which runs Ray's program.

As a program, `python -m tests.forked_workers SOCKET` is the process that forks; the raylet runs a small script, which
sends it the worker.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRELOADED = [
    "hfbatch.runtime.runner", "hfbatch.data.reader", "hfbatch.output.sinks.parquet", "hfbatch.train.loop.loop",
    "hfbatch.train.loop.trainer", "transformers.modeling_utils", "pandas",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert", "hfbatch.engines.torch",
    "sklearn.metrics", "torch.utils.tensorboard", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
]  # fmt: skip
START_S = 120
VARIABLE = "HFBATCH_TESTS_FORK_SOCKET"
"""For programs that tests start, and that start clusters."""

CLIENT = """
import json, os, socket, sys
if any(one.startswith("--serialized-runtime-env-context") for one in sys.argv):
    os.execv(sys.executable, [sys.executable, {ray!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    told = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(told)
    server.recv(1)
"""


@contextmanager
def forked_workers() -> Iterator[None]:
    """Within it, clusters that this process starts, and programs that it starts, fork their workers."""
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        path = os.path.join(folder, "socket")
        forker = subprocess.Popen([sys.executable, "-m", "tests.forked_workers", path])
        try:
            deadline = time.monotonic() + START_S
            while not os.path.exists(path):
                assert forker.poll() is None, "the forking process has ended"
                assert time.monotonic() < deadline, "the forking process did not start"
                time.sleep(0.05)
            os.environ[VARIABLE] = path
            use_forked_workers()
            yield
        finally:
            os.environ.pop(VARIABLE, None)
            forker.terminate()
            forker.wait()


def use_forked_workers() -> None:
    """Has clusters that this process starts from now on fork their workers, if VARIABLE is set."""
    from ray._private.parameter import RayParams

    begin = RayParams.update_if_absent

    def update_if_absent(params: RayParams, **values: object) -> None:
        path = os.environ.get(VARIABLE)
        if path and "setup_worker_path" in values:
            values["setup_worker_path"] = str(_client(path, str(values["setup_worker_path"])))
        begin(params, **values)

    if begin.__name__ != "forked":
        update_if_absent.__name__ = "forked"
        RayParams.update_if_absent = update_if_absent


def _client(path: str, setup: str) -> Path:
    script = Path(path).with_name("worker.py")
    if not script.exists():
        script.write_text(CLIENT.format(path=path, ray=setup))
    return script


def serve(path: str) -> None:
    """Forks a worker for each connection, until it is terminated."""
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen(64)
        os.rename(path + ".new", path)
        while True:
            client, _ = server.accept()
            with client:
                size, streams, _, _ = socket.recv_fds(client, 8, 3)
                told = b""
                while len(told) < int.from_bytes(size, "big"):
                    told += client.recv(1 << 20)
                if os.fork() == 0:
                    server.close()
                    client.close()
                    _work(streams, *json.loads(told))
                client.sendall(b"1")
                for stream in streams:
                    os.close(stream)


def _work(streams: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Becomes the worker."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    with suppress(OSError):
        os.chdir(folder)
    random.seed()
    sys.argv = [
        one for one in arguments if not one.startswith("--language=")
    ]  # it is for Ray's setup_worker.py
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
