"""A whole job in this process: the plan, the steps of each split and the end are the job's own, without Ray.

For what a job gives, whatever carries its splits; tests/jobs keeps one job through Ray for each kind of payload, and
all that is about processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hfbatch import JobSpec
from hfbatch.cluster import stages
from hfbatch.data.splits import Split
from hfbatch.output.lock import hold
from hfbatch.output.manifest import Manifest
from hfbatch.pages import report
from hfbatch.predict.plan import Plan, look_again, make_plan
from hfbatch.predict.run import Clock, JobResult, _finish, _prepare_output
from hfbatch.runtime.runner import Runner

CHARTS = "throughput", "lengths", "padding", "stages", "clock", "rejects", "histogram"


def job_here(
    spec: JobSpec, overwrite: bool = False, meanwhile: Callable[[], Any] = lambda: None
) -> JobResult:
    """Runs a job, or what is left of it, one split after another, on one thread. Its report has no charts, which take
    longer than most of these jobs: jobs through Ray and tests/test_report.py draw them.

    :param meanwhile: called after the plan is made, before work starts.
    """
    plan = make_plan(spec, overwrite)
    meanwhile()
    with hold(plan.spec.output.path, print) as lock:
        plan.ledger.claim = lock.claim
        look_again(plan)
        job = _prepare_output(plan)
        manifests: list[Manifest] = []
        if plan.todo:
            runner = Runner(plan.runner, 1e-9)
            choice = plan.choice or replace(runner.default_choice(), batch_size=_size(spec))
            plan.ledger.write_job({**job, "settled": vars(choice)})
            runner.apply(choice)
            manifests = [_split_here(plan, runner, split) for split in plan.todo]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "draw", lambda _: dict.fromkeys(CHARTS, ""))
            return _finish(plan, lock, manifests, Clock(), None)


def _size(spec: JobSpec) -> int:
    return 8 if spec.batch.size == "auto" else spec.batch.size


def _split_here(plan: Plan, runner: Runner, split: Split) -> Manifest:
    job, manifest = plan.stage_job(), Manifest(split.part, started=time.time())
    row: dict[str, Any] = {"split": json.dumps(split.to_dict()), "rejects": "[]"}
    try:
        stage = "preprocess"
        row = stages._read(row, manifest, job)
        stage = "forward"
        row, _ = stages.forward(row, manifest, runner.predict)
        stage = "write"
        stages._write(row, manifest, job)
    except Exception as error:  # noqa: BLE001 - as a stage does, which never raises
        stages.record_failure(manifest, stage, error)
    return manifest
