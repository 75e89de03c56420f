"""The replicas of an endpoint on Ray Serve: each holds the model, collects rows of requests, and answers over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from hfbatch.cluster.resources import Layout
from hfbatch.cluster.stages import share_of_node
from hfbatch.engines.base import DeviceLostError
from hfbatch.serve.app import OnToken, build_app
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.gate import Gate
from hfbatch.serve.metrics import Board, Metrics, Snapshot
from hfbatch.serve.plan import EndpointConfig
from hfbatch.serve.rows import Answer, Row

REPORT_S = 5.0
"""Seconds between two reports of a replica to the board."""
DRAIN_S = 30.0
"""Seconds that a replica which is ended has for its requests."""
RETRY_S = 1.0
"""What 429 tells clients to wait."""
TOGETHER = 1
"""Sets of rows that are worked on at the same time: one is tokenised while the model runs the other."""
Item = tuple[Row, OnToken | None]


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
        # Every thread that calls torch gets threads of OpenMP of its own, which wait for work by spinning.
        self._threads = ThreadPoolExecutor(TOGETHER, "hfbatch-model")
        where = self._endpoint.config.endpoint
        self._collect.set_max_batch_size(where.rows)
        self._collect.set_batch_wait_timeout_s(where.wait_ms / 1000)

    def __serve_build_asgi_app__(self) -> Gate:
        """The application that Ray Serve runs in this process."""
        if self._board:
            self._reports = asyncio.get_running_loop().create_task(self._report())
        return build_app(self._endpoint, self._ask, self._metrics, self._endpoint.label)

    async def _ask(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[Answer]:
        """Has rows answered together with those of other requests."""
        return await asyncio.gather(*(self._collect((row, on_token)) for row in rows))

    @serve.batch(max_concurrent_batches=TOGETHER)
    async def _collect(self, items: list[Item]) -> list[Answer]:
        """Answers the rows of several requests; those that wait meanwhile form the next set."""
        self._metrics.together(len(items))
        listeners = {place: on_token for place, (_, on_token) in enumerate(items) if on_token}
        loop = asyncio.get_running_loop()

        def report(place: int, token: int) -> None:
            """Passes on a token from the thread that generates."""
            if place in listeners:
                loop.call_soon_threadsafe(listeners[place], token)

        rows = [row for row, _ in items]
        try:
            work = partial(self._endpoint.answer, rows, report if listeners else None)
            return await loop.run_in_executor(self._threads, work)
        except DeviceLostError:
            os._exit(1)  # a new process gets a fresh device context; Ray Serve starts it

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
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": layout.cpus, "num_gpus": layout.gpus},
        **replicas,
    )
    several = scale.max if scale else layout.workers
    if several == 1:
        return deployment.bind(config.to_json(), layout.cpus)
    board = serve.deployment(Board).options(name=f"{where.name}-metrics", ray_actor_options={"num_cpus": 0})
    return deployment.bind(config.to_json(), layout.cpus, board.bind())
