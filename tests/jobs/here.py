"""A whole job in this process: the plan, the steps of each split and the end are the job's own, without Ray.

For what a job gives, whatever carries its splits; tests/jobs keeps one job through Ray for each kind of payload, and
all that is about processes.
"""

from __future__ import annotations

import json
import time
from typing import Any

from hfbatch import JobSpec
from hfbatch.cluster import stages
from hfbatch.cluster.pipeline import stage_job
from hfbatch.compute.worker import Settled, Worker
from hfbatch.data.lock import hold
from hfbatch.data.manifest import Manifest
from hfbatch.data.splits import Split
from hfbatch.job import Clock, JobResult, _finish, _prepare_output
from hfbatch.plan import Plan, look_again, make_plan


def job_here(spec: JobSpec, overwrite: bool = False) -> JobResult:
    """Runs a job, or what is left of it, one split after another, on one thread."""
    plan = make_plan(spec, overwrite)
    with hold(plan.spec.output.path, print) as lock:
        plan.ledger.claim = lock.claim
        look_again(plan)
        job = _prepare_output(plan)
        manifests: list[Manifest] = []
        if plan.todo:
            worker = Worker(plan.order, 1e-9)
            settled = plan.settled or Settled(_size(spec), worker.engine.dtype, worker.engine.device)
            plan.ledger.write_job({**job, "settled": vars(settled)})
            worker.settle(settled)
            manifests = [_split_here(plan, worker, split) for split in plan.todo]
        return _finish(plan, lock, manifests, Clock(), None)


def _size(spec: JobSpec) -> int:
    return 8 if spec.batch.size == "auto" else spec.batch.size


def _split_here(plan: Plan, worker: Worker, split: Split) -> Manifest:
    job, manifest = stage_job(plan, None), Manifest(split.part, started=time.time())
    row: dict[str, Any] = {"split": json.dumps(split.to_dict()), "rejects": "[]"}
    try:
        row = stages._read(row, manifest, job)
        row, _ = stages.forward(row, manifest, worker.predict)
        stages._write(row, manifest, job)
    except Exception as error:  # noqa: BLE001 - as a stage does, which never raises
        manifest.error = f"{type(error).__name__}: {error}"
    return manifest
