"""Connects to a running Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants
from ray._private.node import Node as RayNode

from hfbatch.cluster.sockets import check_sockets
from hfbatch.cluster.watch import ENDED_BY_RAY, Watch, watched
from hfbatch.console import supervisor
from hfbatch.console.display import prepare_streams, say, screen
from hfbatch.data.temporary import environment, own_folder
from hfbatch.errors import SpecError
from hfbatch.runtime.machine import Node, collector_at_rest, usable_cores

CONNECT_TIMEOUT_S = 5
INNER = "hfbatch-"
"""Ray's folder inside the private folder of this job."""
RAY_WAITS_S = 300
LEAVE_S = 18
"""Timeout for disconnecting from a lost cluster."""
KEEP_WORKERS = {"kill_idle_workers_interval_ms": 0}
"""By default, Ray ends idle task processes beyond the number of CPUs after a second. On two cores, each split then
started new ones, with imports and tokenizer, on the cores that the model needs: a third of the rate was lost."""
HELPERS = "start_monitor", "start_api_server", "start_log_monitor"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# For clusters started by hfbatch: the model is the main work there, and should not run at niceness 15.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray Data's actors cause warnings of Ray's core on stderr, which would disturb the progress display.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def connect(address: str | None = None, ahead: Ahead | None = None) -> Iterator[Watch]:
    """Connects to Ray while the block runs: keeps an existing connection, or uses `address`, or a running cluster of
    this user on this machine, or starts a local cluster that ends with the block.

    :param address: host:port, ray://host:port, "auto", or "local" for a new cluster for this job.
    :param ahead: a local cluster whose start has begun; used in place of the address.
    :returns: the watch of the cluster, which knows whether it is lost.
    :raises SpecError: if no cluster answers at an address that was given.
    :raises WorkerError: if the cluster is lost.
    """
    if ahead is None and ray.is_initialized():
        with watched() as watch:
            yield watch
        return
    with ExitStack() as ends:
        if ahead is not None:
            node, folder = ahead.take()
            ends.push(folder)
        else:
            node = ends.enter_context(begin(address))
        with (
            redirect_stdout(sys.stderr),
            watched(node) as watch,
        ):  # Ray prints warnings to stdout, which is for results
            try:
                yield watch
            finally:
                watch.leaving = True
                _leave(node, watch)
    supervisor.note("")


@contextmanager
def begin(address: str | None) -> Iterator[Any | None]:
    """Connects to a cluster, or starts one with its files in a folder that is deleted after the block.

    Does not disconnect. :returns: the node if one was started.
    """
    # A cluster started for this job has its files in a separate folder. In Ray's default folder, the next command on
    # this machine would find its address, connect to it, and fail when this job ends. Ray makes its folder accessible
    # to all users, so it lies in a private one.
    with own_folder(parent=os.environ.get("RAY_TMPDIR", "/tmp")) as folder:  # noqa: S108 - as Ray's default: socket paths have to be short
        supervisor.note(ENDED_BY_RAY)
        yield _initialise(address, folder)


class Ahead:
    """A cluster on this machine that starts in a thread, while the job is planned."""

    def __init__(self) -> None:
        self._ends = ExitStack()
        self._node: Any = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._taken = False
        threading.Thread(target=self._start, name="hfbatch-start", daemon=True).start()

    def take(self) -> tuple[Any, ExitStack]:
        """Waits until the cluster has started; returns its node, and what to close when the job has left it.

        :raises Exception: the error of the start.
        """
        self._ready.wait()
        if self._error is not None:
            raise self._error
        self._taken = True
        return self._node, self._ends

    def close(self) -> None:
        """Ends the cluster if no job has taken it."""
        if not self._taken:
            self._ready.wait()
            ray.shutdown()
            self._ends.close()

    def _start(self) -> None:
        try:
            self._node = self._ends.enter_context(begin("local"))
            import ray.data

            # A job's first dataset waits for an actor of Ray Data to start, which takes seconds.
            ray.data.range(1)
        except BaseException as error:  # noqa: BLE001 - raised where the cluster is needed
            self._error = error
        self._ready.set()
        # Ray has Linux kill its processes when the thread that started them ends (PR_SET_PDEATHSIG).
        threading.Event().wait()


def start_ahead(address: str | None) -> Ahead | None:
    """Begins to start a cluster; returns None if the job is going to use one that runs."""
    if ray.is_initialized() or address not in (None, "local"):
        return None
    return None if address is None and find_cluster(None) else Ahead()


def _initialise(address: str | None, folder: Path) -> Any | None:
    """Connects; returns the node if one was started."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    there = None if address == "local" else find_cluster(address)
    if there is None:
        check_sockets(str(folder / INNER))
    with _stderr_aside(), _signals_kept():
        if there is None:
            inner = folder / INNER
            with _on_loopback(), without_helpers():
                ray.init(
                    address="local",
                    num_cpus=usable_cores(),
                    include_dashboard=False,
                    _system_config=KEEP_WORKERS,
                    _temp_dir=str(inner),
                    **quiet,
                )
            inner.chmod(0o700)
            return ray._private.worker._global_node
        try:
            with _patient():
                ray.init(address=there, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SpecError(
                f"--address: no Ray cluster answers at {there!r}: {error}; give the address of a running one, or "
                "--address local to start one for this job"
            ) from error
    return None


@collector_at_rest()
def _leave(node: Any | None, watch: Watch) -> None:
    """Disconnects, and ends a cluster started here. If the cluster's head is gone, Ray may wait for it forever.

    A garbage collection meanwhile, in whatever thread, could release an object of Ray whose core has ended, on which the
    core ends the process.
    """
    if not watch.lost:
        ray.shutdown()
        return
    # Kills a stopped head, since Ray waits for its answer. Ray ends the raylet: killing it would end this process.
    _kill("gcs_server", node)
    leaving = threading.Thread(target=ray.shutdown, name="hfbatch-leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)


def _kill(kind: str, node: Any | None) -> None:
    for info in node.all_processes.get(kind, []) if node else []:
        info.process.kill()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Makes a starting cluster listen on 127.0.0.1 only, as Ray does on systems without multi-node clusters."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def without_helpers() -> Iterator[None]:
    """Makes a starting cluster leave out processes that import their libraries for seconds and have no work where a cluster is
    one machine and one job: the autoscaler, the server of the dashboard, which is off, and the one that sends the logs of
    workers to drivers."""
    kept = {name: getattr(RayNode, name) for name in HELPERS}
    for name in HELPERS:
        setattr(RayNode, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in kept.items():
            setattr(RayNode, name, start)


@contextmanager
def _patient() -> Iterator[None]:
    """Makes Ray wait for a lost head longer than this process does, so that Ray does not end the process first."""
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    with environment({name: os.environ.get(name) or str(RAY_WAITS_S)}):
        yield


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keeps the SIGTERM handler: Ray would install one that ends the process with exit code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def find_cluster(address: str | None) -> str | None:
    """Returns the address to connect to; None if none was given and no cluster of this user runs here.

    Tries the port first, since Ray waits for minutes for a cluster that is gone.

    :raises SpecError: if no cluster answers at an address that was given.
    """
    asked = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    found, stranger = (asked, "") if asked else _own_address()
    if found and "://" not in found and not _answers(found):
        found = None
    if found is None and stranger and address == "auto":
        raise SpecError(f"--address auto: {stranger}; give the cluster's address, HOST:PORT, if you trust it")
    if found is None and (asked or address == "auto"):
        raise SpecError(
            f"--address: no Ray cluster answers at {asked or address!r}; "
            "start one with `ray start --head`, or use --address local"
        )
    if stranger:
        say(screen(err=True), f"{stranger}: it is not used; this job starts its own cluster")
    return found


def _own_address() -> tuple[str | None, str]:
    """Returns the address in Ray's temporary folder, and the reason not to use it, if there is one.

    All users can write to that folder. The cluster of another user could read this job's data and run any code in this
    process.
    """
    file = Path(get_ray_address_file(None))
    try:
        for path, kind in ((file.parent, stat.S_ISDIR), (file, stat.S_ISREG)):
            facts = path.lstat()
            if not kind(facts.st_mode) or facts.st_uid != os.getuid():
                return (
                    None,
                    f"{path} belongs to user {facts.st_uid} or is a link, so its cluster may not be yours",
                )
        return file.read_text(encoding="utf8").strip() or None, ""
    except (OSError, ValueError):
        return None, ""


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


@contextmanager
def _stderr_aside() -> Iterator[None]:
    """Discards what Ray's C++ core writes to stderr at start, which would disturb the progress display.

    Messages of Python code, which may run in another thread, are written to stderr.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        with redirect_stderr(_stream_to(kept)):
            os.dup2(nowhere, 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _stream_to(descriptor: int) -> TextIO:
    """Returns a stream that stays open: handlers of logging that are created meanwhile keep it."""
    stream = os.fdopen(os.dup(descriptor), "w", encoding=sys.stderr.encoding, buffering=1)
    prepare_streams([stream])
    return stream


def nodes() -> list[Node]:
    """Returns the live nodes of the cluster."""
    counts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(count.get("CPU", 0.0), count.get("GPU", 0.0)) for count in counts]


def ceiling() -> Node | None:
    """Returns the cluster's total resources after autoscaling; None for a cluster of fixed size."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return Node(float(most.get("CPU", 0)), float(most.get("GPU", 0))) if most else None


def describe() -> dict[str, Any] | None:
    """Returns nodes and resources of a running cluster; None if there is none. Starts nothing."""
    try:
        with connect("auto"):
            found = nodes()
            total = {"cpus": sum(node.cpus for node in found), "gpus": sum(node.gpus for node in found)}
            return {"nodes": len(found), **total, "ray": ray.__version__}
    except SpecError:
        return None
