"""Whether a cluster has room for endpoints: Ray Serve listens on one address, and each path has one application."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import ray
from ray.serve.context import _get_global_client

from hfbatch.errors import SpecError
from hfbatch.serve.plan import url_of
from hfbatch.spec.serve import EndpointSpec

HEAD = "node:__internal_head__"
"""A resource of the node where Ray Serve listens."""


def check_room(where: EndpointSpec, paths: Mapping[str, str]) -> None:
    """Checks the address and the paths of endpoints on the connected cluster.

    Ray Serve that runs ignores another address, and replaces an application by one of its name.

    :param where: the address.
    :param paths: name of each endpoint to its path.
    :raises SpecError: with what is taken.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_port(where)
        return
    found, faults = client.http_config, []
    if (found.host, found.port) != (where.host, where.port):
        faults.append(
            f"Ray Serve runs on this cluster already, at {found.host}:{found.port}; use --host {found.host} "
            f"--port {found.port}, or --address local for a cluster of its own"
        )
    if found.request_timeout_s != where.limits.seconds:
        faults.append(
            f"Ray Serve runs on this cluster already, and ends requests after {found.request_timeout_s} seconds; "
            "set serve.limits.seconds to this, or use --address local"
        )
    running = {
        name: application["route_prefix"]
        for name, application in client.get_serve_details()["applications"].items()
    }
    faults += [
        f"{name} at {path} is served on this cluster already; end it first, or use --address local"
        for name, path in running.items()
        if name in paths or path in paths.values()
    ]
    if faults:
        raise SpecError(faults)


def _check_port(where: EndpointSpec) -> None:
    """Ray Serve shares a port with other servers that share it: some of the requests would reach those."""
    head = next((node["NodeID"] for node in ray.nodes() if HEAD in node["Resources"]), None)
    if head != ray.get_runtime_context().get_node_id():
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that end do not count
            probe.bind(address)
    except OSError as error:
        raise SpecError(
            f"cannot listen at {url_of(where)}: {error.strerror or error}; use another --port or --host"
        ) from error
