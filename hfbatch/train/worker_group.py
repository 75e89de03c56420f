"""Starts the training processes with Ray Train, monitors them, and reports why they ended in one sentence."""

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

from hfbatch.console import supervisor
from hfbatch.data.filesystem import join, one_line, open_filesystem
from hfbatch.data.temporary import own_folder
from hfbatch.errors import HfbatchError, SpecError, WorkerError
from hfbatch.runtime.heartbeat import beating
from hfbatch.runtime.machine import Node, collector_at_rest
from hfbatch.spec.finetune import TrainWorkersSpec
from hfbatch.train.loop.worker_config import TrainWorkerConfig

POLL_S = 0.5
BOARD_S = 60
"""Timeout of calls to the board, an actor on the driver's machine."""
SILENCE_S = 1800
"""Timeout of the training processes' heartbeats, which each sends every few seconds."""
END_S = 600
"""Time that Ray may take to end the processes once training is done."""
WAIT_S = 10
"""Seconds after which it is said that the processes wait for the cluster; then each minute."""
STARTS = 10
"""How often Ray tries to place the processes, a minute each; by default, it would never give up."""
News = dict[str, Any]


@dataclass(frozen=True)
class WorkerGroup:
    """Number and resources of the training processes."""

    workers: int
    gpus: float
    """GPUs of one process."""
    cpus: float
    """CPUs of one process."""
    at_least: int
    """Minimum number of processes with which training continues when the cluster shrinks."""

    @property
    def size(self) -> dict[str, float]:
        """What one process takes of a node, as Ray names it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def choose_worker_group(
    spec: TrainWorkersSpec, nodes: list[Node], ceiling: Node | None = None
) -> WorkerGroup:
    """Chooses number and size of the processes so that they fit into the cluster, each on one node.

    :param ceiling: totals that an autoscaler may grow the cluster to; None for a fixed cluster.
    :raises SpecError: if they do not fit.
    """
    rooms = [ceiling] if ceiling else nodes
    all_gpus, all_cpus = sum(room.gpus for room in rooms), sum(room.cpus for room in rooms)
    gpus = (1.0 if all_gpus else 0.0) if spec.gpus == "auto" else spec.gpus
    if spec.strategy == "fsdp" and gpus < 1:
        raise SpecError(
            f"workers.strategy fsdp shards a model over GPUs, and each process has {gpus:g}; use ddp"
        )
    one = 1.0 if spec.cpus == "auto" else spec.cpus
    count = (_fitting(rooms, one, gpus) if gpus else 1) if spec.count == "auto" else spec.count
    least = spec.at_least or count
    count = max(count, least)
    cpus = one if gpus or spec.cpus != "auto" else _share(count, nodes)
    if spec.strategy == "fsdp" and least < 2:
        raise SpecError(
            f"workers.strategy fsdp needs at least two processes, and there may be only {least}; set "
            f"workers.count and workers.at_least to 2 or more (the cluster has {all_gpus:g} GPUs), or use ddp"
        )
    if not 1 <= least <= _fitting(rooms, cpus, gpus):
        raise SpecError(
            f"workers: {least} of {cpus:g} CPUs and {gpus:g} GPUs do not fit into the cluster ({all_cpus:g} CPUs, "
            f"{all_gpus:g} GPUs on {len(nodes)} nodes, each process on one); set smaller workers.count, workers.cpus "
            "or workers.gpus"
        )
    return WorkerGroup(count, gpus, float(cpus), least)


def _fitting(rooms: list[Node], cpus: float, gpus: float) -> int:
    """Returns the number of processes of this size that fit."""
    each = (min(room.cpus / cpus, room.gpus / gpus if gpus else math.inf) for room in rooms)
    return sum(int(number + 1e-9) for number in each)


def _share(count: int, nodes: list[Node]) -> float:
    """Returns the CPUs of each of `count` processes without GPUs: the largest node's, divided among its share."""
    largest, mean = max(node.cpus for node in nodes), sum(node.cpus for node in nodes) / count
    return float(max(int(largest // max(-(-largest // mean), 1)), 1))


@ray.remote(num_cpus=0)
class Board:
    """Actor that collects news of the training processes for the driver; outlives each of them."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.fault = ""
        self.sign = time.time()

    def post(self, news: News) -> None:
        """Adds a piece of news."""
        self.news.append(news)

    def beat(self) -> None:
        """Records the heartbeat of a process."""
        self.sign = time.time()

    def since(self, number: int) -> tuple[list[News], float]:
        """Returns the news from a number on, and the seconds since the last heartbeat."""
        return self.news[number:], time.time() - self.sign

    def fail(self, fault: str) -> None:
        """Records a fault that another attempt cannot fix."""
        self.fault = self.fault or fault

    def failed(self) -> str:
        """Returns the fault that another attempt cannot fix; empty if there is none."""
        return self.fault


def fit(
    config: TrainWorkerConfig, team: WorkerGroup, on_news: Callable[[News], None], say: Callable[[str], None]
) -> News:
    """Runs the training processes to the end; returns the last news.

    :param on_news: called from another thread.
    :param say: called from another thread, with what the processes wait for.
    :raises WorkerError: if training cannot continue.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer = _trainer(config, team, board)
    follower = _Follower(board, team, on_news, say)
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
            fault or f"training ended early: {_cause(error, config.spec.workers.failures)}"
        ) from error
    finally:
        last = follower.close()
    fault = follower.fault()
    if fault or not last.get("done"):
        raise WorkerError(fault or "training ended early without an error message")
    return last


def _trainer(config: TrainWorkerConfig, team: WorkerGroup, board: Any) -> Any:
    """Returns Ray Train's trainer of the training, which ends and restarts its processes together."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        """TorchTrainer without the actor that frees a training's processes if the state API lacks its controller.

        With several clusters on a machine, that actor may query the wrong one and end a running training. Ray frees
        the processes anyway when this program ends.
        """

        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            return [one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback"]

    fs, root = open_filesystem(join(config.state, "ray"))
    elastic = team.at_least < team.workers
    return Trainer(
        _process,
        # The object, not its JSON: Ray shows this config as text in its dashboard, and its text has no secrets.
        train_loop_config={"config": config, "board": board, "cpus": team.cpus},
        torch_config=TorchConfig(backend="nccl" if team.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(team.at_least, team.workers) if elastic else team.workers,
            use_gpu=team.gpus > 0,
            resources_per_worker=team.size,
        ),
        run_config=RunConfig(
            name="run",
            storage_path=root,
            storage_filesystem=fs,
            failure_config=FailureConfig(config.spec.workers.failures, controller_failure_limit=STARTS),
        ),
    )


def waiting(team: WorkerGroup) -> str:
    """Returns what processes of this size wait for; empty if Ray has placed all of them."""
    groups = ray.util.placement_group_table().values()
    if not any(
        group["state"] == "PENDING" and all(one == team.size for one in group["bundles"].values())
        for group in groups
    ):
        return ""
    free = ray.available_resources()
    room = ", ".join(f"{free.get(name, 0):g} {name}s" for name in team.size)
    each = " and ".join(f"{number:g} {name}s" for name, number in team.size.items())
    return (
        f"waiting for {team.at_least} processes of {each} each; free in the cluster: {room}; see `ray status`"
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Converts Ray's SystemExit after Ctrl-C to KeyboardInterrupt, and restores the handler that Ray replaces."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class _Follower(threading.Thread):
    """Reads the board twice a second; interrupts the main thread if waiting has become pointless."""

    def __init__(
        self, board: Any, team: WorkerGroup, on_news: Callable[[News], None], say: Callable[[str], None]
    ) -> None:
        super().__init__(name="hfbatch-training", daemon=True)
        self._board, self._team, self._on_news, self._say, self._seen = board, team, on_news, say, 0
        self._next_note = time.monotonic() + WAIT_S
        self._over = threading.Event()
        self._last: News = {}
        self._done = 0.0
        self.wrong = ""
        """The fault that makes waiting pointless; empty if there is none."""

    def run(self) -> None:
        """Reads the board until `close`."""
        while not self._over.wait(POLL_S):
            try:
                self.wrong = self._read()
                self._note_waiting()
            except Exception as error:  # noqa: BLE001 - this thread must not end silently
                self.wrong = f"the driver lost contact with the training processes: {one_line(error)}"
            if self.wrong:
                supervisor.interrupt(self.wrong, self._over)
                return

    def _note_waiting(self) -> None:
        """Says what the processes wait for, if they have not begun and wait for room in the cluster."""
        if not self._seen and time.monotonic() > self._next_note:
            self._next_note = time.monotonic() + 60
            if text := waiting(self._team):
                self._say(text)

    def _read(self) -> str:
        """Passes on the news; returns the fault that makes waiting pointless, if any."""
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
        """Returns the fault that another attempt cannot fix; empty if there is none, or the board does not answer."""
        try:
            return ray.get(self._board.failed.remote(), timeout=BOARD_S)
        except RayError:
            return ""

    def close(self) -> News:
        """Reads the remaining news; returns the last piece."""
        self._over.set()
        self.join(2 * BOARD_S)
        with suppress(RayError):
            self._read()
        return self._last


def _process(values: dict[str, Any]) -> None:
    """Runs the training in one process of Ray Train."""
    with collector_at_rest():
        import torch
        from ray.train import get_context, get_preemption_info

        from hfbatch.train.loop.loop import train

    board, context = values["board"], get_context()
    if ray.get(board.failed.remote(), timeout=BOARD_S):
        return  # another attempt cannot fix it
    torch.set_num_threads(max(int(values["cpus"]), 1))
    try:
        with own_folder("train-") as local, beating(board.beat.remote):
            train(
                values["config"], local, context.get_world_rank(), context.get_world_size(),
                lambda news: board.post.remote(news), lambda: get_preemption_info() is not None,
            )  # fmt: skip
    except HfbatchError as error:
        ray.get(board.fail.remote(str(error)), timeout=BOARD_S)
        raise


def _cause(error: BaseException, allowed: int) -> str:
    """Returns why training ended, in one sentence: a process that died, else the message of an exception.

    :param allowed: number of failures after which training was restarted.
    """
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    if any(isinstance(getattr(one, "health_check_failure", None), RayError) for one in failures):
        return (
            "a process died (killed, out of memory, or its machine is gone), after as many failures as "
            f"workers.failures={allowed} allows; the same command resumes from the newest checkpoint"
        )
    lines = [line for line in str(failures[0] if failures else error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else one_line(error)
