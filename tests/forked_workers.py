"""Starts the Ray workers of tests as forks of one process that has imported their libraries.

Ray starts a Python interpreter for each worker, where the imports of torch and transformers take five to eight seconds of
a core, longer than the work of most tests. Here, the raylet starts this file instead of Ray's `setup_worker.py`: it passes
the command line, the environment and the streams that the raylet gave it to a process that forks, and a fork runs Ray's
own program for workers. Ray reads its variables when it is imported, among them the raylet's process: there is one fork for
each raylet, which imports Ray and forks the raylet's workers.
"""

from __future__ import annotations

import gc
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
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

PRELOADED = [
    "hfbatch.runtime.runner", "hfbatch.data.reader", "hfbatch.output.sinks.parquet", "hfbatch.train.loop.loop",
    "hfbatch.train.loop.trainer", "hfbatch.engines.torch", "transformers.modeling_utils", "pandas",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert", "sklearn.metrics",
    "torch.utils.tensorboard", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "hfbatch.train.loop.export", "hfbatch.train.recipes.text_classification", "scipy.io", "tests.warm",
]  # fmt: skip
WITH_RAY = [
    "ray._private.workers.default_worker", "ray.train.torch", "hfbatch.cluster.stage_job", "hfbatch.cluster.stages",
    "hfbatch.cluster.tracker", "hfbatch.train.worker_group", "tests.warm_ray",
]  # fmt: skip
"""What the processes of one raylet import."""
NO_JOB = {"RAY_JOB_ID": "f" * 8}
"""The job of workers that are started before there is one; theirs comes with their first task."""
ROOT = Path(__file__).parent.parent
START_S = 120
SOCKET = "HFBATCH_TESTS_FORK_SOCKET"
"""Name of the variable with the address of the process that forks."""
CONTEXT = "--serialized-runtime-env-context="
SIZE = 8
"""Bytes of a message's length."""


@contextmanager
def forked_workers() -> Iterator[None]:
    """Within it, clusters that this process starts fork their workers, and those of programs that call
    `use_forked_workers`. Machines with a GPU start them as Ray does: a fork cannot use CUDA if its parent has."""
    if list(Path("/dev").glob("nvidia[0-9]*")):
        yield
        return
    # The path of a socket has to be short, and TMPDIR may be long.
    with tempfile.TemporaryDirectory(prefix="fork-", dir="/tmp") as folder:
        path = os.path.join(folder, "socket")
        forker = subprocess.Popen([sys.executable, "-m", "tests.forked_workers", "serve", path], cwd=ROOT)
        try:
            deadline = time.monotonic() + START_S
            while not os.path.exists(path):
                assert forker.poll() is None, "the forking process has ended"
                assert time.monotonic() < deadline, "the forking process did not start"
                time.sleep(0.05)
            os.environ[SOCKET] = path
            use_forked_workers()
            yield
        finally:
            os.environ.pop(SOCKET, None)
            forker.terminate()
            forker.wait()


def use_forked_workers() -> None:
    """Has clusters that this process starts from now on fork their workers, if SOCKET is set."""
    from ray._private.parameter import RayParams

    set_defaults = RayParams.update_if_absent

    def with_this_file(params: RayParams, **values: object) -> None:
        if "setup_worker_path" in values and SOCKET in os.environ:
            values["setup_worker_path"] = __file__
        set_defaults(params, **values)

    RayParams.update_if_absent = with_this_file


Request = tuple[list[int], list[str], dict[str, str], str]
"""Streams, command line, environment and folder of a worker."""


def serve(path: str) -> None:
    """Has a worker forked for each connection, until it is terminated."""
    _import(PRELOADED)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    raylets: dict[frozenset[tuple[str, str]], socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen(64)
        os.rename(path + ".new", path)
        while True:
            client, _ = server.accept()
            with client:
                request = receive(client)
            assert request is not None
            streams, arguments, environment, folder = request
            settings = {key: value for key, value in environment.items() if key.startswith("RAY_")}
            key = frozenset((settings | NO_JOB).items())
            if key not in raylets:
                raylets[key] = _process_of_a_raylet(environment, streams, server, *raylets.values())
            send(raylets[key], streams, arguments, environment, folder)
            for stream in streams:
                os.close(stream)


def _process_of_a_raylet(
    environment: dict[str, str], streams: list[int], *inherited: socket.socket
) -> socket.socket:
    """Starts the process that forks the workers of one raylet; what is sent to the socket are requests for them."""
    ours, requests = socket.socketpair(socket.AF_UNIX)
    if os.fork():
        requests.close()
        return ours
    for one in (ours, *inherited):
        one.close()
    for stream in streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment | NO_JOB)
    with _seeds_left_to_the_forks():
        _import(WITH_RAY)
    while request := receive(requests):
        if os.fork() == 0:
            requests.close()
            _work(*request)
        for stream in request[0]:
            os.close(stream)
    os._exit(0)


@contextmanager
def _seeds_left_to_the_forks() -> Iterator[None]:
    """Has Ray's generator of random ids, which is seeded with its first use, unused by this process.

    Forks that share its state give tasks the same ids; an actor that gets two of them at once ends, as Ray Serve's proxy
    did. Ray draws an id for each class of actors that is defined.
    """
    import ray.actor

    kind = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    try:
        yield
    finally:
        ray.actor.ActorClassID = kind


def _import(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def send(to: socket.socket, streams: list[int], *values: object) -> None:
    """Sends the request for a worker."""
    message = json.dumps(values).encode()
    socket.send_fds(to, [len(message).to_bytes(SIZE)], streams)
    to.sendall(message)


def receive(source: socket.socket) -> Request | None:
    """The next request for a worker; None if the other end is closed."""
    size, streams, _, _ = socket.recv_fds(source, SIZE, 3)
    message = b""
    while len(message) < int.from_bytes(size):
        message += source.recv(int.from_bytes(size) - len(message))
    return (list(streams), *json.loads(message)) if size else None


def _work(streams: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Runs a worker to its end."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    with suppress(OSError):
        os.chdir(folder)
    random.seed()
    sys.argv = arguments
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(arguments: list[str]) -> None:
    """Starts a worker as a fork, in place of Ray's program `setup_worker.py`, which it runs if more is asked of the
    worker's environment than variables."""
    context = next(
        (json.loads(one.removeprefix(CONTEXT)) for one in arguments if one.startswith(CONTEXT)), {}
    )
    variables = context.pop("env_vars", {})
    if context.pop("py_executable", sys.executable) != sys.executable or any(context.values()):
        ray = Path(find_spec("ray").origin).parent  # type: ignore[union-attr, arg-type]
        os.execv(sys.executable, [sys.executable, str(ray / "_private/workers/setup_worker.py"), *arguments])
    environment = {**os.environ, **{name: os.path.expandvars(value) for name, value in variables.items()}}
    command = [one for one in arguments if not one.startswith((CONTEXT, "--language="))]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        send(server, [0, 1, 2], command, environment, os.getcwd())
        server.recv(1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        start(sys.argv[1:])
