"""Runs splits through Ray Data: read, forward, write; the driver receives a manifest of each split."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import GetTimeoutError, RayError

from hfbatch.cluster.resources import Layout
from hfbatch.cluster.stage_job import StageJob
from hfbatch.cluster.stages import ForwardStage, describe_splits, read_stage, write_stage
from hfbatch.cluster.tracker import Activity, start_tracker
from hfbatch.console import supervisor
from hfbatch.data.splits import Split
from hfbatch.errors import WorkerError
from hfbatch.output.manifest import Manifest
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice

WORKER_TIMEOUT_S = 900
"""Timeout for the first worker: a new node boots and downloads the model in this time."""
LOADING_S = 300
"""A live process that has been loading the model for longer than this has a slow disk or network; the job waits."""
SILENCE_TIMEOUT_S = 1800
"""Timeout without any heartbeat: live processes send one every few seconds, however slow their split is."""
STUCK_TIMEOUT_S = 24 * 3600
"""Timeout without any progress: no batch finished, no split begun or ended."""
TRACKER_TIMEOUT_S = 60
"""Timeout for an answer of the tracker, a process on the driver's machine."""
POLL_S = 0.5
POLL_AT_START_S = 0.1
"""Until the runtime choice is stored, the workers wait for this process."""
BLOCKS = 4096
"""Splits are passed to Ray in at most about this many blocks, since each block costs the driver time."""


def process(
    job: StageJob,
    splits: Sequence[Split],
    layout: Layout,
    on_activity: Callable[[Activity], None],
    on_choice: Callable[[RuntimeChoice], None],
) -> Generator[Manifest, None, None]:
    """Runs splits; yields the manifest of each split when it is committed or has failed.

    :param on_activity: called twice a second from another thread.
    :param on_choice: called with the runtime choice before any result is computed; must store it durably.
    :raises WorkerError: if no worker can run the model, or no worker sends heartbeats.
    """
    choice = RunnerConfig.from_json(job.runner).choice
    tracker = start_tracker(asdict(choice) if choice else None)
    try:
        blocks = _dataset(replace(job, tracker=tracker), splits, layout).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        with _watch(tracker, choice is not None, on_activity, on_choice), closing(iter(blocks)) as results:
            for block in results:
                for text in block["manifest"].to_pylist():
                    yield Manifest.from_json(text)
    except RayError as error:
        raise WorkerError(f"Ray ended the job: {_cause(error)}") from error
    finally:
        with suppress(RayError, RuntimeError):  # if the cluster is gone, the tracker is gone too
            ray.kill(tracker)


def _dataset(job: StageJob, splits: Sequence[Split], layout: Layout) -> Dataset:
    _quiet()
    per_block = -(-len(splits) // BLOCKS)
    blocks = [describe_splits(splits[k : k + per_block]) for k in range(0, len(splits), per_block)]
    return (
        ray.data.from_arrow(blocks)
        .map_batches(
            read_stage,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"job": job},
            compute=TaskPoolStrategy(size=layout.read_tasks),
            num_cpus=layout.read_cpus,
        )
        .map_batches(
            ForwardStage,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"job": job, "cpus": layout.cpus},
            compute=ActorPoolStrategy(size=layout.workers),
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
        )
        .map_batches(
            write_stage,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"job": job},
            compute=TaskPoolStrategy(size=layout.write_tasks),
            num_cpus=layout.write_cpus,
        )
    )


def _quiet() -> None:
    """Disables Ray's progress display and its stall detection, which counts blocks: one block can take hours."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _watch(
    tracker: Any,
    chosen: bool,
    on_activity: Callable[[Activity], None],
    on_choice: Callable[[RuntimeChoice], None],
) -> Iterator[None]:
    """Polls the tracker from a thread; a failure there interrupts the main thread.

    :param chosen: whether the runtime choice has been made by an earlier run.
    :raises WorkerError: if the workers are silent, or a choice cannot be stored.
    """
    stop = threading.Event()
    wrong: list[str] = []

    def poll() -> None:
        """Reads the tracker until the block ends or a failure is found."""
        confirmed, patience = chosen, WORKER_TIMEOUT_S  # it has to start first, on a machine that may be busy
        begun = time.time()
        while not stop.wait(POLL_S if confirmed else POLL_AT_START_S) and not wrong:
            activity: Activity = ray.get(tracker.activity.remote(), timeout=patience)
            patience = TRACKER_TIMEOUT_S
            if activity.proposal and not confirmed:
                on_choice(RuntimeChoice(**activity.proposal))
                ray.get(tracker.confirm.remote(activity.proposal), timeout=patience)
                confirmed = True
            on_activity(activity)
            wrong.extend(_silence(activity, begun))

    def guarded() -> None:
        """Polls until the job ends; interrupts the job for a slow tracker, a lost one, or workers without a sign."""
        try:
            poll()
        except GetTimeoutError:
            wrong.append(
                f"the job's tracker, a process on this machine, has not answered for {TRACKER_TIMEOUT_S} s: it may be "
                "stopped, or the machine may be short of memory"
            )
        except Exception as error:  # noqa: BLE001 - workers wait for this thread: if it ends, the job must end
            wrong.append(f"the driver lost contact with its workers: {type(error).__name__}: {error}")
        if wrong:
            supervisor.interrupt(wrong[0], stop)

    thread = threading.Thread(target=guarded, name="hfbatch-watch", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if wrong:
            raise WorkerError(wrong[0]) from None
        raise
    finally:
        stop.set()
        thread.join(timeout=10)


def _cause(error: RayError) -> str:
    """Returns the last line of Ray's message, which names the exception; the others are stack frames."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _silence(activity: Activity, begun: float) -> list[str]:
    """Returns the fault if the workers have been silent, or without progress, for too long."""
    now = time.time()
    loading = activity.loading and now - activity.loading > LOADING_S
    if not activity.workers and not loading and now - begun > WORKER_TIMEOUT_S:
        return [
            f"no model worker has started in {WORKER_TIMEOUT_S // 60} minutes; "
            "other jobs may hold the cluster: see `ray status`, or set smaller workers.count or workers.cpus"
        ]
    if activity.workers and now - activity.last_sign > SILENCE_TIMEOUT_S:
        return [f"no worker has sent a heartbeat for {SILENCE_TIMEOUT_S // 60} minutes; see `ray status`"]
    if now - activity.last_progress > STUCK_TIMEOUT_S:
        oldest = f", the oldest on split {activity.oldest_part}" if activity.oldest_part else ""
        return [
            f"the workers are alive, but have made no progress for {STUCK_TIMEOUT_S // 3600} hours{oldest}; "
            "lower input.split_rows if its rows are slow"
        ]
    return []
