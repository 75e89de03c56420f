"""Ports of this machine."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this machine on which nothing listens at the moment.

    It is none of those that Linux gives to programs which name none (from 32768), and that Ray gives to workers (10002 to
    19999): their gRPC servers share ports (SO_REUSEPORT), so that they would get some of the requests.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
