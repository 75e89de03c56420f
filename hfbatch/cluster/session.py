"""The session: attaches to a running Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants

from hfbatch import supervisor
from hfbatch.cluster.watch import ENDED_BY_RAY, Watch, watched
from hfbatch.compute.machine import Node, usable_cores
from hfbatch.data.temporary import own_folder
from hfbatch.display import say, screen
from hfbatch.errors import SpecError

CONNECT_TIMEOUT_S = 5
RAY_WAITS_S = 300
LEAVE_S = 18
"""How long leaving a cluster that is lost may take."""
KEEP_WORKERS = {"kill_idle_workers_interval_ms": 0}
"""Ray ends idle task processes beyond the number of CPUs after a second. On two cores each split then paid for
new ones, with their imports and tokenizer, on the cores that the model needs: a third of the rate."""
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of the clusters that hfbatch starts: the model is the work there, and should not run at niceness 15.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray Data's own actors make Ray's core warn on stderr, in the middle of the progress display.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def connect(address: str | None = None) -> Iterator[Watch]:
    """Within it, ray is connected: to the process's own connection, to `address`, to a cluster of this user's that runs
    on this machine, or to a local one that is started and ends with the block.

    :param address: host:port, ray://host:port, "auto", or "local" for a cluster of this job's own.
    :returns: the watch over the cluster, which knows whether it is lost.
    :raises SpecError: if nothing answers at an address that was given.
    :raises WorkerError: if the cluster is lost.
    """
    if ray.is_initialized():
        with watched() as watch:
            yield watch
        return
    # A cluster of this job's own has its files in a folder of its own. In the one that Ray has for all, the next
    # command on this machine would find its address, attach to it, and be lost when this job ends. Ray opens its
    # folder to everybody, hence a closed one around it.
    with own_folder(parent=os.environ.get("RAY_TMPDIR", "/tmp")) as folder:  # noqa: S108 - as Ray's own: names of sockets have to be short
        supervisor.note(ENDED_BY_RAY)
        node = _initialise(address, folder)
        with (
            redirect_stdout(sys.stderr),
            watched(node) as watch,
        ):  # Ray prints warnings; stdout is for results
            try:
                yield watch
            finally:
                watch.leaving = True
                _leave(node, watch)
    supervisor.note("")


def _initialise(address: str | None, folder: Path) -> Any | None:
    """Connects; returns the node where one was started."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    there = None if address == "local" else find_cluster(address)
    with _stderr_aside(), _signals_kept():
        if there is None:
            inner = folder / "hfbatch-"
            with _on_loopback():
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
                f"--address: no Ray cluster answers at {there!r}: {error}; give the address of one that runs, or "
                "--address local for one of this job's own"
            ) from error
    return None


def _leave(node: Any | None, watch: Watch) -> None:
    """Disconnects, and ends the own cluster. Without the cluster's head, Ray may wait for it for ever."""
    if not watch.lost:
        ray.shutdown()
        return
    # A stopped head is killed, since Ray waits for its answer. The raylet is left to Ray: with it dies this process.
    for info in node.all_processes.get("gcs_server", []) if node else []:
        info.process.kill()
    leaving = threading.Thread(target=ray.shutdown, name="hfbatch-leave", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a cluster that starts listen on 127.0.0.1 alone, as Ray itself does where it has no clusters of machines."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _patient() -> Iterator[None]:
    """Has Ray's library wait longer than this process does for a head that is gone, before it ends the process."""
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    before = os.environ.get(name)
    os.environ[name] = before or str(RAY_WAITS_S)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM goes on to mean what it meant: Ray would have it end the process with exit code 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def find_cluster(address: str | None) -> str | None:
    """The address to attach to; None if none was asked for and no cluster of this user's runs here.

    Ray itself waits for minutes for a cluster that is gone, so the port is tried first.

    :raises SpecError: if nothing answers at an address that was asked for.
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
        say(screen(err=True), f"{stranger}: it is not joined; this job starts a cluster of its own")
    return found


def _own_address() -> tuple[str | None, str]:
    """The address that Ray's folder for temporary files names, and what speaks against using it, if anything does.

    Everybody can write into that folder: a cluster of another user would read this job's data, and run code as it
    likes in this process.
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
    """Keeps what Ray's C++ core writes to stderr while it starts out of the progress display."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def nodes() -> list[Node]:
    """The live nodes of the cluster."""
    counts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(count.get("CPU", 0.0), count.get("GPU", 0.0)) for count in counts]


def ceiling() -> Node | None:
    """What an autoscaler may grow the cluster to; None for a cluster of fixed size."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return Node(float(most.get("CPU", 0)), float(most.get("GPU", 0))) if most else None


def describe() -> dict[str, Any] | None:
    """Nodes and resources of a cluster that runs already; None if there is none. Starts nothing."""
    try:
        with connect("auto"):
            found = nodes()
            total = {"cpus": sum(node.cpus for node in found), "gpus": sum(node.gpus for node in found)}
            return {"nodes": len(found), **total, "ray": ray.__version__}
    except SpecError:
        return None
