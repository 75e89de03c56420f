"""Starts the training processes with Ray Train, follows them, and says in one sentence what ended them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hfbatch import supervisor
from hfbatch.compute.heartbeat import beating
from hfbatch.compute.machine import Node, collector_at_rest
from hfbatch.data.filesystem import join, one_line, open_filesystem
from hfbatch.data.temporary import own_folder
from hfbatch.errors import HfbatchError, SpecError, WorkerError
from hfbatch.finetune_spec import TrainWorkersSpec
from hfbatch.train.order import TrainOrder

POLL_S = 0.5
BOARD_S = 60
"""How long the board, a process on the driver's machine, may take to answer."""
SILENCE_S = 1800
"""How long the training processes may be silent: each tells every few seconds that it lives."""
END_S = 600
"""How long Ray may take to end the processes once training is done."""
STARTS = 10
"""How often processes that find no place are asked for, a minute each time; Ray would ask for ever."""
News = dict[str, Any]


@dataclass(frozen=True)
class Team:
    """Who trains."""

    workers: int
    gpus: float
    """GPUs of one process."""
    cpus: float
    """CPUs of one process."""
    at_least: int
    """How many go on training when the cluster shrinks."""


def choose_team(spec: TrainWorkersSpec, nodes: list[Node], ceiling: Node | None = None) -> Team:
    """Fits the processes into the cluster, each of them onto one node.

    :param ceiling: totals that an autoscaler may grow the cluster to; None for a fixed cluster.
    :raises SpecError: if they do not fit.
    """
    rooms = [ceiling] if ceiling else nodes
    all_gpus, all_cpus = sum(room.gpus for room in rooms), sum(room.cpus for room in rooms)
    gpus = (1.0 if all_gpus else 0.0) if spec.gpus == "auto" else spec.gpus
    if spec.strategy == "fsdp" and gpus < 1:
        raise SpecError(
            f"workers.strategy fsdp shares a model among GPUs, and each process has {gpus:g}; use ddp"
        )
    one = 1.0 if spec.cpus == "auto" else spec.cpus
    count = (_fitting(rooms, one, gpus) if gpus else 1) if spec.count == "auto" else spec.count
    least = spec.at_least or count
    count = max(count, least)
    cpus = one if gpus or spec.cpus != "auto" else _share(count, nodes)
    if spec.strategy == "fsdp" and least < 2:
        raise SpecError(
            f"workers.strategy fsdp shares a model among two processes at least, and {least} may be all; set "
            f"workers.count and workers.at_least to 2 or more (the cluster has {all_gpus:g} GPUs), or use ddp"
        )
    if not 1 <= least <= _fitting(rooms, cpus, gpus):
        raise SpecError(
            f"workers: {least} of {cpus:g} CPUs and {gpus:g} GPUs do not fit into the cluster ({all_cpus:g} CPUs, "
            f"{all_gpus:g} GPUs on {len(nodes)} nodes, each process on one); set smaller workers.count, workers.cpus "
            "or workers.gpus"
        )
    return Team(count, gpus, float(cpus), least)


def _fitting(rooms: list[Node], cpus: float, gpus: float) -> int:
    """How many processes of this size there is room for."""
    each = (min(room.cpus / cpus, room.gpus / gpus if gpus else math.inf) for room in rooms)
    return sum(int(number + 1e-9) for number in each)


def _share(count: int, nodes: list[Node]) -> float:
    """CPUs of each of `count` processes without GPUs: as many as the largest node has for its share of them."""
    largest, mean = max(node.cpus for node in nodes), sum(node.cpus for node in nodes) / count
    return float(max(int(largest // max(-(-largest // mean), 1)), 1))


@ray.remote(num_cpus=0)
class Board:
    """What the training processes want the driver to know; outlives each of them."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.fault = ""
        self.sign = time.time()

    def tell(self, news: News) -> None:
        """Adds a piece of news."""
        self.news.append(news)

    def beat(self) -> None:
        """Notes that a process lives."""
        self.sign = time.time()

    def since(self, number: int) -> tuple[list[News], float]:
        """News from a number on, and for how many seconds nobody has given a sign of life."""
        return self.news[number:], time.time() - self.sign

    def fail(self, fault: str) -> None:
        """Notes what no further attempt would mend."""
        self.fault = self.fault or fault

    def failed(self) -> str:
        """What no further attempt would mend; empty if nothing is."""
        return self.fault


def fit(order: TrainOrder, team: Team, on_news: Callable[[News], None]) -> News:
    """Trains to the end; returns the last news.

    :param on_news: called from another thread.
    :raises WorkerError: if training cannot go on.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """Without the actor that frees a training's processes once the state API does not know its controller.

        Where several clusters run on a machine it may ask the wrong one, and end a training that is well. Ray
        frees the processes anyway when this program ends.
        """

        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            return [one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback"]

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    fs, root = open_filesystem(join(order.state, "ray"))
    elastic = team.at_least < team.workers
    trainer = Trainer(
        _process,
        train_loop_config={"order": order.to_json(), "board": board, "cpus": team.cpus},
        torch_config=TorchConfig(backend="nccl" if team.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(team.at_least, team.workers) if elastic else team.workers,
            use_gpu=team.gpus > 0,
            resources_per_worker={"CPU": team.cpus, **({"GPU": team.gpus} if team.gpus else {})},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=root,
            storage_filesystem=fs,
            failure_config=FailureConfig(order.spec.workers.failures, controller_failure_limit=STARTS),
        ),
    )
    follower = _Follower(board, on_news)
    follower.start()
    try:
        with _interruptible():
            trainer.fit()
    except KeyboardInterrupt:
        if follower.wrong:
            raise WorkerError(follower.wrong) from None
        raise
    except Exception as error:
        fault = follower.wrong or follower.fault()
        raise WorkerError(
            fault or f"training ended early: {_cause(error, order.spec.workers.failures)}"
        ) from error
    finally:
        last = follower.close()
    fault = follower.fault()
    if fault or not last.get("done"):
        raise WorkerError(fault or "training ended early, without a word")
    return last


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt: Ray ends the processes, then leaves with SystemExit, and keeps the signal."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class _Follower(threading.Thread):
    """Reads the board twice a second; interrupts the main thread where waiting is of no use any more."""

    def __init__(self, board: Any, on_news: Callable[[News], None]) -> None:
        super().__init__(name="hfbatch-training", daemon=True)
        self._board, self._on_news, self._seen = board, on_news, 0
        self._over = threading.Event()
        self._last: News = {}
        self._done = 0.0
        self.wrong = ""
        """Why waiting is of no use, in a sentence; empty while all is well."""

    def run(self) -> None:
        """Until `close`."""
        while not self._over.wait(POLL_S):
            try:
                self.wrong = self._read()
            except Exception as error:  # noqa: BLE001 - the end of this thread must not be a silent one
                self.wrong = f"the driver lost touch with the training processes: {one_line(error)}"
            if self.wrong:
                supervisor.interrupt(self.wrong, self._over)
                return

    def _read(self) -> str:
        """Takes in the news; returns what is wrong, if anything is."""
        found, silent = ray.get(self._board.since.remote(self._seen), timeout=BOARD_S)
        for news in found:
            self._seen, self._last = self._seen + 1, news
            self._on_news(news)
        if self._last.get("done"):
            self._done = self._done or time.monotonic()
            late = time.monotonic() - self._done > END_S
            return f"training is done, but Ray has not ended it within {END_S // 60} minutes" if late else ""
        if silent > SILENCE_S:
            return f"no training process has given a sign of life for {SILENCE_S // 60} minutes; see `ray status`"
        return ""

    def fault(self) -> str:
        """What no further attempt would mend; empty if nothing is, or nobody can say."""
        try:
            return ray.get(self._board.failed.remote(), timeout=BOARD_S)
        except RayError:
            return ""

    def close(self) -> News:
        """Reads what is left; returns the last piece."""
        self._over.set()
        self.join(2 * BOARD_S)
        with suppress(RayError):
            self._read()
        return self._last


def _process(config: dict[str, Any]) -> None:
    """What Ray Train runs in each process."""
    with collector_at_rest():
        import torch
        from ray.train import get_context, get_preemption_info

        from hfbatch.train.loop import train

    board, context = config["board"], get_context()
    if ray.get(board.failed.remote(), timeout=BOARD_S):
        return  # nothing is gained by another attempt
    torch.set_num_threads(max(int(config["cpus"]), 1))
    try:
        with own_folder("train-") as local, beating(board.beat.remote):
            train(
                TrainOrder.from_json(config["order"]), local, context.get_world_rank(), context.get_world_size(),
                lambda news: board.tell.remote(news), lambda: get_preemption_info() is not None,
            )  # fmt: skip
    except HfbatchError as error:
        ray.get(board.fail.remote(str(error)), timeout=BOARD_S)
        raise


def _cause(error: BaseException, allowed: int) -> str:
    """What ended training, in one sentence: a process that died, else the message of the exception of one.

    :param allowed: how many failures were mended.
    """
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    if any(isinstance(getattr(one, "health_check_failure", None), RayError) for one in failures):
        return (
            "a process died (killed, out of memory, or its machine is gone), after as many failures as "
            f"workers.failures={allowed} mends; the same command goes on from the newest checkpoint"
        )
    lines = [line for line in str(failures[0] if failures else error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else one_line(error)
