"""The way of the splits through Ray Data: read, forward, write, and a manifest of each back to the driver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.exceptions import GetTimeoutError, RayError

from hfbatch import supervisor
from hfbatch.cluster.resources import Layout
from hfbatch.cluster.stages import ForwardStage, StageJob, describe_splits, read_stage, write_stage
from hfbatch.cluster.tracker import Activity, start_tracker
from hfbatch.compute.worker import Settled
from hfbatch.data.manifest import Manifest
from hfbatch.errors import WorkerError
from hfbatch.plan import Plan

WORKER_TIMEOUT_S = 900
"""How long the first worker may take to appear: a new node boots and downloads the model in this time."""
LOADING_S = 300
"""A process that has been loading the model for this long, and lives, has a slow disk or network: it is waited for."""
SILENCE_TIMEOUT_S = 1800
"""How long all workers may be silent: a process that lives tells so every few seconds, however slow its split is."""
STUCK_TIMEOUT_S = 24 * 3600
"""How long they may live without any progress: no batch finished, no split begun or ended."""
TRACKER_TIMEOUT_S = 60
"""How long the tracker, a process on the driver's machine, may take to answer."""
POLL_S = 0.5
BLOCKS = 4096
"""Splits are fed to Ray in at most about this many blocks: each one costs the driver time."""


def process(
    plan: Plan, layout: Layout, on_activity: Callable[[Activity], None], on_settled: Callable[[Settled], None]
) -> Generator[Manifest, None, None]:
    """Runs every split that is to do; yields its manifest once it is committed or has failed.

    :param on_activity: called twice a second from another thread.
    :param on_settled: called before any result is computed; must make the choice durable.
    :raises WorkerError: if no worker can run the model, or none shows a sign of life.
    """
    tracker = start_tracker(asdict(plan.settled) if plan.settled else None)
    try:
        blocks = _dataset(plan, layout, tracker).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        with _watch(tracker, on_activity, on_settled), closing(iter(blocks)) as results:
            for block in results:
                for text in block["manifest"].to_pylist():
                    yield Manifest.from_json(text)
    except RayError as error:
        raise WorkerError(f"Ray ended the job: {_cause(error)}") from error
    finally:
        with suppress(RayError, RuntimeError):  # where the cluster is gone, the tracker is gone with it
            ray.kill(tracker)


def _dataset(plan: Plan, layout: Layout, tracker: Any) -> Dataset:
    job = StageJob(
        order=plan.order.to_json(),
        read=plan.read,
        inputs=plan.inputs,
        keep=tuple(plan.keep),
        out=plan.spec.output.path,
        schema=plan.schema,
        truncated=plan.spec.output.truncated_column,
        rejects_schema=plan.rejects_schema,
        stamp={"fingerprint": plan.fingerprint, "commit": plan.model.commit},
        tracker=tracker,
    )
    _quiet()
    splits = plan.todo
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
    """hfbatch shows its own progress; Ray's guard against stalls counts blocks, and a block can take hours."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1
    context.memory_usage_poll_interval_s = None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _watch(
    tracker: Any, on_activity: Callable[[Activity], None], on_settled: Callable[[Settled], None]
) -> Iterator[None]:
    """Polls the tracker from a thread; what goes wrong there interrupts the main thread.

    :raises WorkerError: if the workers are silent, or a choice cannot be made durable.
    """
    stop = threading.Event()
    wrong: list[str] = []

    def poll() -> None:
        """Reads the tracker until the block ends or something is wrong."""
        confirmed, patience = False, WORKER_TIMEOUT_S  # it has to start first, on a machine that may be busy
        begun = time.time()
        while not stop.wait(POLL_S) and not wrong:
            activity: Activity = ray.get(tracker.activity.remote(), timeout=patience)
            patience = TRACKER_TIMEOUT_S
            if activity.proposal and not confirmed:
                on_settled(Settled(**activity.proposal))
                ray.get(tracker.confirm.remote(activity.proposal), timeout=patience)
                confirmed = True
            on_activity(activity)
            wrong.extend(_silence(activity, begun))

    def guarded() -> None:
        try:
            poll()
        except GetTimeoutError:
            wrong.append(
                f"the job's tracker, a process on this machine, has not answered for {TRACKER_TIMEOUT_S} s: it may be "
                "stopped, or the machine short of memory"
            )
        except Exception as error:  # noqa: BLE001 - workers wait for this thread: its end must end the job
            wrong.append(f"the driver lost touch with its workers: {type(error).__name__}: {error}")
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
    """The last line of Ray's message, which names the exception; the lines before it are stack frames."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _silence(activity: Activity, begun: float) -> list[str]:
    """What is wrong, if the workers have been silent for too long."""
    now = time.time()
    loading = activity.loading and now - activity.loading > LOADING_S
    if not activity.workers and not loading and now - begun > WORKER_TIMEOUT_S:
        return [
            f"no model worker has started in {WORKER_TIMEOUT_S // 60} minutes; "
            "other jobs may hold the cluster: see `ray status`, or set smaller workers.count or workers.cpus"
        ]
    if activity.workers and now - activity.last_sign > SILENCE_TIMEOUT_S:
        return [f"no worker has given a sign of life for {SILENCE_TIMEOUT_S // 60} minutes; see `ray status`"]
    if now - activity.last_progress > STUCK_TIMEOUT_S:
        oldest = f", the oldest on split {activity.oldest_part}" if activity.oldest_part else ""
        return [
            f"the workers live, but have got no further for {STUCK_TIMEOUT_S // 3600} hours{oldest}; "
            "lower input.split_rows if its rows are slow"
        ]
    return []
