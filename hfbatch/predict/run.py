"""Runs a job: plans it, connects to Ray, processes the splits, checks the output and writes the report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hfbatch.console.display import say as show_line
from hfbatch.console.display import screen
from hfbatch.console.progress import Progress, Snapshot
from hfbatch.errors import HfbatchError, LockLostError, WorkerError
from hfbatch.output.layout import ERRORS, REJECTS
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import Lock, hold
from hfbatch.output.manifest import Manifest
from hfbatch.output.sink import State
from hfbatch.pages import charts
from hfbatch.pages.page import count
from hfbatch.pages.report import build_report, render_files
from hfbatch.predict.plan import Plan, look_again, make_plan
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.spec.job import JobSpec

if TYPE_CHECKING:
    from hfbatch.cluster.session import Ahead

DONE, SOME_FAILED, BAD_SPEC, TOO_MANY_REJECTS, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes. After 1 and 130, the same command resumes the job."""


@dataclass(frozen=True)
class JobResult:
    """The result of a job."""

    exit_code: int
    output: str
    report: dict[str, Any] = field(repr=False)
    """The content of report.json."""
    message: str
    """One sentence for the user."""


class Clock:
    """Measures the driver's phases in seconds. :param started: unix time when the command began."""

    def __init__(self, started: float | None = None) -> None:
        self.started = started or time.time()
        self.phases: dict[str, float] = {}
        self._last = self.started

    def lap(self, name: str, at: float | None = None) -> None:
        """Ends a phase, now or at a unix time."""
        now = at or time.time()
        self.phases[name] = max(now - self._last, 0.0)
        self._last = max(now, self._last)

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return time.time() - self.started


def run(
    spec: JobSpec,
    *,
    address: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    started: float | None = None,
    at_end: ExitStack | None = None,
) -> JobResult:
    """Runs a job, or its remaining splits.

    :param address: a Ray cluster; default: a running one, else a local one.
    :param overwrite: whether to replace the output of another job.
    :param console: console for progress; default: stderr.
    :param quiet: whether to hide progress.
    :param started: unix time when the command began, for the report.
    :param at_end: if given, a local cluster starts while the job is planned; if the plan finds faults, it is left to
        this stack to end it, so that they are shown first.
    :raises SpecError: with every fault, before anything is started.
    :raises OutputHeldError: if another process is writing to the output.
    """
    clock = Clock(started)
    begun = _begin_cluster(spec, address, at_end) if at_end is not None else None
    plan = make_plan(spec, overwrite)
    clock.lap("plan")
    console = console or screen(err=True)
    manifests: list[Manifest] = []
    problem = None

    def say(text: str) -> None:
        if not quiet:
            show_line(console, text, wrap=False)

    with hold(plan.spec.output.path, say) as lock:
        plan.ledger.claim = lock.claim
        plan.ledger.clean_temporary()
        look_again(plan)
        if plan.todo:
            progress = Progress(console, plan.title, quiet)
            problem = _process(plan, lock, address, begun, clock, manifests, progress)
        else:
            _prepare_output(plan)
        return _finish(plan, lock, manifests, clock, problem)


def _begin_cluster(spec: JobSpec, address: str | None, at_end: ExitStack) -> Ahead | None:
    """Begins to start a local cluster, unless the output is complete: then nothing may be left to do."""
    from hfbatch.cluster.session import start_ahead

    with suppress(HfbatchError, OSError):  # reported by the plan
        begun = None if Ledger(spec.output.path).has_success() else start_ahead(address)
        return at_end.enter_context(closing(begun)) if begun else None
    return None


def _process(
    plan: Plan,
    lock: Lock,
    address: str | None,
    begun: Ahead | None,
    clock: Clock,
    manifests: list[Manifest],
    progress: Progress,
) -> BaseException | None:
    """Processes the splits on the cluster; returns the error that ended it early, if any."""
    from hfbatch.cluster.pipeline import process
    from hfbatch.cluster.resources import lay_out
    from hfbatch.cluster.session import ceiling, connect, nodes
    from hfbatch.cluster.tracker import Activity

    follower = Follower(plan, clock, manifests, progress)
    with progress:
        follower.say("connecting to Ray")
        with connect(address, begun) as cluster:
            clock.lap("connect")
            layout = lay_out(plan.workers, nodes(), ceiling(), plan.threads).at_most(len(plan.todo))
            job = _prepare_output(plan)

            def on_choice(choice: RuntimeChoice) -> None:
                plan.ledger.write_job({**job, "settled": vars(choice)})

            def on_activity(activity: Activity) -> None:
                follower.follow(vars(activity))

            follower.say(f"starting {layout.workers} model worker{'s' * (layout.workers > 1)}")
            try:
                # Always closed: a pipeline that is still running when Ray shuts down would end the driver.
                with (
                    lock.interrupting(),
                    closing(process(plan.stage_job(), plan.todo, layout, on_activity, on_choice)) as results,
                ):
                    for manifest in results:
                        manifests.append(manifest)
                        follower.first_part = follower.first_part or clock.elapsed
                        if manifest.fatal:
                            return WorkerError(manifest.error or "")
            except (WorkerError, KeyboardInterrupt) as error:
                return cluster.or_lost(error)
            finally:
                follower.close()
                charts.preload()  # while Ray ends its processes
    return None


class Follower:
    """Converts the workers' activity to progress and to the phases of the clock."""

    def __init__(self, plan: Plan, clock: Clock, manifests: list[Manifest], progress: Progress) -> None:
        self._plan, self._clock, self._manifests, self._progress = plan, clock, manifests, progress
        self._done_before = len(plan.state.done)
        self._rows_before = sum(split.rows for split in plan.state.done)
        self._activity: dict[str, Any] = {}
        self.first_part = 0.0

    def say(self, state: str) -> None:
        """Shows a state."""
        self._show(state)

    def follow(self, activity: dict[str, Any]) -> None:
        """Updates the progress from the tracker's activity."""
        self._activity = activity
        if activity["first_batch"]:
            self._show("running")
        elif activity["workers"]:
            compiling = "compiling the model, " if self._plan.compiles else ""
            self._show(f"{compiling}choosing precision and batch size")

    def close(self) -> None:
        """Shows the last state and ends the phases: workers, calibrate, working."""
        self._show("done")
        activity = self._activity
        if activity.get("first_loaded"):
            self._clock.lap("workers", activity["first_loaded"])
        if activity.get("first_batch"):
            self._clock.lap("calibrate", activity["first_batch"])
        self._clock.lap("working")
        if self.first_part:
            self._clock.phases["first_part"] = self.first_part

    def _show(self, state: str) -> None:
        good = [manifest for manifest in self._manifests if manifest.error is None]
        activity = self._activity
        first_batch = activity.get("first_batch")
        self._progress.update(
            Snapshot(
                splits_done=self._done_before + len(good),
                splits_failed=len(self._manifests) - len(good) + len(self._plan.broken),
                splits_total=len(self._plan.splits),
                rows_done=self._rows_before + max(activity.get("rows", 0), sum(m.rows_in for m in good)),
                rows_total=None if self._plan.spec.input.filter else self._plan.rows,
                tokens=activity.get("tokens", 0),
                padded_tokens=activity.get("padded_tokens", 0),
                rejected=sum(manifest.rows_rejected for manifest in good),
                reading=activity.get("reading", 0),
                oldest=time.time() - activity["oldest"] if activity.get("oldest") else 0.0,
                elapsed=self._clock.elapsed,
                working=time.time() - first_batch if first_batch else 0.0,
                state=state,
            )
        )


def _prepare_output(plan: Plan) -> dict[str, Any]:
    """Prepares the output folder; returns the content of job.json."""
    ledger, job = plan.ledger, plan.job()
    # A complete output may be of an older version of results, with other types.
    if not plan.overwrite and not plan.state.todo:
        job["schema"] = (ledger.read_job() or job)["schema"]
    if plan.overwrite:
        plan.sink.clear()
    if plan.state.todo or plan.state.stale:
        ledger.clear_success()
    ledger.write_job(job)
    return job


def _finish(
    plan: Plan, lock: Lock, manifests: list[Manifest], clock: Clock, problem: BaseException | None
) -> JobResult:
    """Compares the output with the plan, writes the report and, on success, `_SUCCESS`.

    The state of the output is read from a final listing and the footers of the parts, not from the plan or the workers'
    manifests, since others can change the folder while a job runs.
    """
    ledger = plan.ledger
    try:
        lock.check()
    except LockLostError as error:
        problem = error
    lost = isinstance(problem, LockLostError)
    failed = _failures(plan, manifests, problem)
    if not failed and not problem:
        plan.sink.discard(plan.state.stale)
    fresh = [manifest for manifest in manifests if manifest.error is None]
    state, found, wrong = plan.sink.audit(plan.splits, plan.fingerprint, fresh)
    committed = [manifest for manifest in found if manifest.error is None]
    failed += [manifest for manifest in found if manifest.error is not None]
    if not failed and not problem:
        failed = _absent(state, wrong)
    if not failed and not problem:
        plan.sink.finalise(state.done)
    clock.phases["total"] = clock.elapsed
    job = (None if lost else ledger.read_job()) or plan.job()
    ran = {manifest.part for manifest in fresh}
    report = build_report(
        job, [*committed, *failed], ran, clock.phases, job["histogram"], splits_total=len(plan.splits)
    )
    traces = {} if lost else _traces(manifests)
    code, message = _outcome(plan, report, failed, problem, bool(traces))
    report = {**report, "exit_code": code, "message": message}
    if not lost:
        code, message = _leave(plan, job, report, traces)
    return JobResult(code, plan.spec.output.path, report, message)


def _traces(manifests: list[Manifest]) -> dict[str, str]:
    """Takes the tracebacks out of the manifests; returns the first of each kind with the split where it occurred."""
    found: dict[str, str] = {}
    for manifest in manifests:
        for kind, trace in manifest.traces.items():
            found.setdefault(kind, f"{kind}, first in {manifest.part}\n\n{trace}")
        manifest.traces = {}
    return found


def _leave(
    plan: Plan, job: dict[str, Any], report: dict[str, Any], traces: Mapping[str, str]
) -> tuple[int, str]:
    """Writes the files beside the parts; returns exit code and message, which include a failure to write."""
    ledger = plan.ledger
    code, message = report["exit_code"], report["message"]
    try:
        with suppress(OSError):  # this file only saves time in the next run
            plan.sink.save_manifests()
        if ledger.read_job() is None:
            ledger.write_job(job)
        for name, data in render_files(report).items():
            ledger.write(name, data)
        ledger.write_errors(traces, report["rejects"]["reasons"])
    except OSError as error:
        code, message = code or SOME_FAILED, f"{message} The report cannot be written: {error}"
    if code != DONE:
        ledger.clear_success()
    elif not ledger.has_success():
        ledger.mark_success(
            {"fingerprint": plan.fingerprint, "rows": report["rows"], "finished": report["finished"]},
            plan.schema,
        )
    return code, message


def _absent(state: State, wrong: Mapping[str, str]) -> list[Manifest]:
    """Returns a manifest for each split whose committed part is missing or changed, and for each part of no split."""
    gone = "is missing: it was committed, and something has deleted it since; run again"
    return [
        Manifest(
            split.part,
            error=f"{wrong[split.part]}; run again" if split.part in wrong else f"{split.part} {gone}",
        )
        for split in state.todo
    ] + [
        Manifest(part, error=f"{part} belongs to no split of this job and appeared while it ran; run again")
        for part in state.stale
    ]


def _failures(plan: Plan, manifests: list[Manifest], problem: BaseException | None) -> list[Manifest]:
    """Returns a manifest for each split that failed, including splits that the cluster did not return."""
    failed = [manifest for manifest in manifests if manifest.error is not None]
    failed += [Manifest(split.part, error=split.fault) for split in plan.broken]
    if problem is None:
        back = {manifest.part for manifest in manifests}
        failed += [
            Manifest(split.part, error="the cluster lost it; run again")
            for split in plan.todo
            if split.part not in back
        ]
    return failed


def _outcome(
    plan: Plan,
    report: dict[str, Any],
    failed: list[Manifest],
    problem: BaseException | None,
    traced: bool,
) -> tuple[int, str]:
    out = plan.spec.output.path
    where = f"the first traceback of each kind is in {out}/{ERRORS}; " if traced else ""
    splits, rows, rejects = report["splits"], report["rows"], report["rejects"]
    progress = f"{splits['done']:,} of {splits['total']:,} splits are committed"
    again = "the same command resumes from here"
    if isinstance(problem, KeyboardInterrupt):
        return INTERRUPTED, f"Interrupted: {progress}; {again}."
    if problem is not None:
        return SOME_FAILED, f"Stopped: {problem} ({progress}; {where}{again})"
    if failed:
        return (
            SOME_FAILED,
            f"{count(len(failed), 'split')} failed, the first: {failed[0].error} ({progress}; {where}{again})",
        )
    if rejects["fraction"] > plan.spec.rejects.max_fraction:
        return TOO_MANY_REJECTS, (
            f"{rows['rejected']:,} of {rows['in']:,} rows were rejected, more than "
            f"rejects.max_fraction={plan.spec.rejects.max_fraction:g} allows; all rows are written, _SUCCESS is not. "
            f"The rows are in {out}/{REJECTS}; {where}"
            f"to accept them, add --set rejects.max_fraction={_share_above(rejects['fraction'])}"
        )
    begun = "Done" if splits["this_run"] else "Nothing was left to do"
    done = f"{count(rows['out'], 'row')} in {count(splits['total'], 'part')}, {count(rows['rejected'], 'reject')}"
    traces = f" {where[0].upper()}{where[1:].rstrip('; ')}." if traced else ""
    return DONE, f"{begun}: {done}.{traces}{_left_out(report['unplanned'])}"


def _left_out(unplanned: dict[str, int]) -> str:
    """Returns a sentence about columns that appeared too late to be in the parts; empty if there are none."""
    if not unplanned:
        return ""
    columns = ", ".join(f"{name} ({count(rows, 'row')})" for name, rows in list(unplanned.items())[:5])
    more = f" and {len(unplanned) - 5} more" if len(unplanned) > 5 else ""
    return (
        f" The output lacks columns that were in none of the rows which the plan read: {columns}{more}; to keep them, "
        "give their types in input.types and start again with --overwrite."
    )


def _share_above(fraction: float) -> str:
    """Rounds a fraction up to two significant digits."""
    digits = max(2, 1 - math.floor(math.log10(fraction)))
    return f"{min(math.ceil(fraction * 10**digits) / 10**digits, 1.0):g}"
