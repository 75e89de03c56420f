"""Starts endpoints on Ray Serve, and ends them when the process is asked to end."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.context import _set_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ProxyStatus

from hfbatch.cluster.resources import Layout, lay_out
from hfbatch.cluster.session import ceiling, connect, nodes
from hfbatch.errors import SpecError, WorkerError
from hfbatch.serve.haproxy import listening
from hfbatch.serve.plan import ServePlan, make_plan, url_of
from hfbatch.serve.replica import application
from hfbatch.serve.room import check_room
from hfbatch.spec.job import ServeSpec

PROXY_S = 120
"""Seconds in which the process that listens for Ray Serve has to start; on a busy machine it takes ten."""
ANOTHER_CLUSTER = "serve.proxy haproxy is for a cluster that this command starts; use --address local, or leave serve.proxy out"


def lay_out_all(specs: Sequence[ServeSpec]) -> list[Layout]:
    """Resources of a replica of each endpoint on the connected cluster, and the number of its replicas.

    :raises SpecError: if all together do not fit.
    """
    counts = [_replicas(spec) for spec in specs]
    layouts = []
    for spec, count in zip(specs, counts, strict=True):
        together = spec.workers.model_copy(update={"count": sum(counts)})
        layouts.append(replace(lay_out(together, nodes(), ceiling()), workers=count))
    return layouts


def _replicas(spec: ServeSpec) -> int:
    """Replicas that run from the start."""
    if spec.serve.autoscale:
        return spec.serve.autoscale.min
    return 1 if spec.workers.count == "auto" else spec.workers.count


@contextlib.contextmanager
def serving(plans: Sequence[ServePlan], address: str | None = None) -> Iterator[list[str]]:
    """Serves endpoints while the block runs; gives the URL of each. One endpoint is at /, several are below their names.

    :param plans: with one host and port.
    :param address: a Ray cluster; default: a running one, else a local one.
    :raises SpecError: if they do not fit, or the cluster cannot listen by HAProxy; see also `check_room`.
    :raises WorkerError: if a model does not load, or Ray Serve does not listen.
    """
    where = plans[0].spec.serve
    by_haproxy = where.proxy == "haproxy"
    with listening(by_haproxy), connect(address) as cluster:
        if by_haproxy and not cluster.own:
            raise SpecError([ANOTHER_CLUSTER])
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        layouts = lay_out_all([plan.spec for plan in plans])
        names = [plan.spec.serve.name for plan in plans]
        paths = [f"/{name}" if len(plans) > 1 else "/" for name in names]
        check_room(where, dict(zip(names, paths, strict=True)))
        options = {"host": where.host, "port": where.port, "request_timeout_s": where.limits.seconds}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"log_level": "ERROR"})
        try:
            for plan, layout, path in zip(plans, layouts, paths, strict=True):
                _start(plan, layout, path)
            _wait_for_proxy(url_of(where))
            yield [f"{url_of(where)}{path.rstrip('/')}" for path in paths]
        finally:
            _end(names, cluster.own)


def serve_until_ended(
    plans: Sequence[ServePlan], address: str | None, say_ready: Callable[[list[str]], None]
) -> None:
    """Serves endpoints until SIGINT or SIGTERM, then lets them answer the requests that they have.

    :param say_ready: called with their URLs once all answer.
    """
    with serving(plans, address) as urls, _signals() as pipe:
        say_ready(urls)
        os.read(pipe, 1)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Gives a pipe that gets a byte for each SIGINT and SIGTERM: a lock could be held by the code that they interrupt."""
    reading, writing = os.pipe()
    kept = {
        number: signal.signal(number, lambda *_: os.write(writing, b"."))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield reading
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)


def build(args: dict[str, Any]) -> serve.Application:
    """Builds an endpoint for the `serve` program of Ray: `serve run hfbatch.serve.run:build spec=serve.yaml`.

    :param args: `spec`, the path of a spec, and overrides such as `batch.size: 64`. Host, port and proxy are those of Ray Serve.
    :raises SpecError: with every fault.
    """
    overrides = [f"{name}={value}" for name, value in args.items() if name != "spec"]
    plan = make_plan(ServeSpec.load(args["spec"], overrides))
    return application(plan.config, lay_out_all([plan.spec])[0])


def _end(names: Sequence[str], own: bool) -> None:
    """Ends applications, and Ray Serve unless it has others, such as those of another command on this cluster.

    :param own: whether the cluster ends next, and Ray Serve with it.
    """
    try:
        for name in names:
            serve.delete(name)
        if not own and not serve.status().applications:
            serve.shutdown()
    finally:
        if own:
            _set_global_client(None)  # of a controller that the next cluster of this process would not have


def _start(plan: ServePlan, layout: Layout, path: str) -> None:
    name = plan.spec.serve.name
    try:
        serve.run(application(plan.config, layout), name=name, route_prefix=path)
    except (RuntimeError, TimeoutError, RayServeException) as error:
        found = serve.status().applications.get(name)
        # Only the message of a deployment has the error of a replica.
        reasons = [one.message for one in found.deployments.values() if one.message] if found else []
        reason = max(reasons, key=len, default=str(error))
        raise WorkerError(f"endpoint {name} does not start: {last_error(reason)}") from error


def _wait_for_proxy(url: str) -> None:
    """Waits until Ray Serve listens: `serve.run` returns when the replicas run, and its proxy may start after them.

    :raises WorkerError: if it does not within PROXY_S.
    """
    deadline = time.monotonic() + PROXY_S
    while ProxyStatus.HEALTHY not in (states := serve.status().proxies.values()):
        if time.monotonic() > deadline:
            shown = ", ".join(state.value for state in states) or "not there"
            raise WorkerError(
                f"Ray Serve does not listen at {url} within {PROXY_S} s: its proxy is {shown}; see the logs of Ray Serve"
            )
        time.sleep(0.1)


def last_error(trace: str) -> str:
    """The error at the end of a traceback, on one line; another text as it is."""
    end = re.split(r"\n[ \t][^\n]*", trace.strip())[-1]
    return " ".join(end.split())[-500:]
