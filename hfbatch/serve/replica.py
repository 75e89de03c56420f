"""The replicas of an endpoint on Ray Serve: each holds the model, collects rows of requests, and answers over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from hfbatch.cluster.resources import Layout
from hfbatch.cluster.stages import share_of_node
from hfbatch.serve.app import build_app
from hfbatch.serve.collect import Collector
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.gate import Gate
from hfbatch.serve.metrics import Board, Metrics, Snapshot
from hfbatch.serve.plan import EndpointConfig

REPORT_S = 5.0
"""Seconds between two reports of a replica to the board."""
RETRY_S = 1.0
"""Seconds that clients wait after 429."""


class Replica:
    """A process with the model.

    :param config: an EndpointConfig as JSON.
    :param cpus: CPUs of this actor; their share of the node's CPUs decides the number of threads.
    :param board: collects the counters of several replicas.
    """

    def __init__(self, config: str, cpus: float, board: DeploymentHandle | None = None) -> None:
        self._endpoint = Endpoint(EndpointConfig.from_json(config), share_of_node(cpus))
        self._board = board
        self._name = serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics(self._exchange) if board else Metrics()

    def __serve_build_asgi_app__(self) -> Gate:
        """The application that Ray Serve runs in this process."""
        if self._board:
            self._reports = asyncio.get_running_loop().create_task(self._report())
        return build_app(self._endpoint, Collector(self._endpoint, self._metrics), self._metrics)

    async def _exchange(self, snapshot: Snapshot) -> Sequence[Snapshot]:
        return await self._board.exchange.remote(self._name, snapshot)  # type: ignore[union-attr]

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            with contextlib.suppress(Exception):  # the next report has the same numbers
                await self._exchange(self._metrics.snapshot())


def application(config: EndpointConfig, layout: Layout) -> serve.Application:
    """Returns the endpoint as Ray Serve runs it.

    :param layout: resources of a replica, and the number of replicas that have room.
    """
    where = config.endpoint
    limits, scale = where.limits, where.autoscale
    replicas: dict[str, Any] = {"num_replicas": layout.workers}
    if scale:
        replicas = {"autoscaling_config": {"min_replicas": scale.min, "max_replicas": scale.max,
                                           "target_ongoing_requests": where.rows}}  # fmt: skip
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=where.name,
        max_ongoing_requests=limits.ongoing,
        max_queued_requests=limits.queued,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_S},
        graceful_shutdown_timeout_s=limits.seconds,
        ray_actor_options={"num_cpus": layout.cpus, "num_gpus": layout.gpus},
        **replicas,
    )
    several = scale.max if scale else layout.workers
    if several == 1:
        return deployment.bind(config.to_json(), layout.cpus)
    board = serve.deployment(Board).options(name=f"{where.name}-metrics", ray_actor_options={"num_cpus": 0})
    return deployment.bind(config.to_json(), layout.cpus, board.bind())
