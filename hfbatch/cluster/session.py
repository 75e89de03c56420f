"""The session: attaches to a running Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import ray

from hfbatch.cluster.sockets import check_sockets
from hfbatch.compute.machine import Node, usable_cores
from hfbatch.errors import SpecError

CONNECT_TIMEOUT_S = 5
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
def connect(address: str | None = None) -> Iterator[None]:
    """Within it, ray is connected: to the process's own connection, to `address`, to a cluster that runs on
    this machine, or to a local one that is started and ends with the block.

    :param address: host:port, ray://host:port, "auto", or "local" for a cluster of this job's own.
    :raises SpecError: if nothing answers at an address that was given.
    """
    if ray.is_initialized():
        yield
        return
    # A cluster of this job's own has its files in a folder of its own. In the one that Ray has for all, the next
    # command on this machine would find its address, attach to it, and be lost when this job ends.
    with tempfile.TemporaryDirectory(
        prefix="hfbatch-",
        dir=os.environ.get("RAY_TMPDIR", "/tmp"),  # noqa: S108 - as Ray's own: names of sockets have to be short
        ignore_cleanup_errors=True,
    ) as folder:
        _initialise(address, folder)
        try:
            with redirect_stdout(sys.stderr):  # where Ray prints its warnings; stdout is for results
                yield
        finally:
            ray.shutdown()


def _initialise(address: str | None, folder: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    there = None if address == "local" else _find_cluster(address)
    if there is None:
        check_sockets(folder)
    with _stderr_aside():
        if there is None:
            ray.init(
                address="local",
                num_cpus=usable_cores(),
                include_dashboard=False,
                _system_config=KEEP_WORKERS,
                _temp_dir=folder,
                **quiet,
            )
            return
        try:
            ray.init(address=there, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SpecError(
                f"--address: no Ray cluster answers at {there!r}: {error}; give the address of one that runs, or "
                "--address local for one of this job's own"
            ) from error


def _find_cluster(address: str | None) -> str | None:
    """The address to attach to; None if none was asked for and no cluster runs here.

    Ray itself waits for minutes for a cluster that is gone, so the port is tried first.

    :raises SpecError: if nothing answers at an address that was asked for.
    """
    from ray._private.utils import read_ray_address

    asked = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    found = asked or read_ray_address()
    if found and "://" not in found and not _answers(found):
        found = None
    if found is None and (asked or address == "auto"):
        raise SpecError(
            f"--address: no Ray cluster answers at {asked or address!r}; "
            "start one with `ray start --head`, or use --address local"
        )
    return found


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
