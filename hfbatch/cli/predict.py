"""The commands that run, plan or preview a job: run, predict, embed, plan, preview."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfbatch.cli.finetune import plan_training, start_training
from hfbatch.cli.options import (
    Address,
    Columns,
    DryRun,
    Input,
    Json,
    Keep,
    Limit,
    Model,
    Output,
    Overwrite,
    Params,
    Quiet,
    Save,
    Sets,
    any_spec,
    job_spec,
)
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import say, screen, show

if TYPE_CHECKING:
    from contextlib import ExitStack

    from rich.console import Console

    from hfbatch.spec.job import JobSpec

STARTED = time.time()
"""When the process started, from which reports measure start-up."""


def run(
    spec: Annotated[str, typer.Argument(help="A YAML spec.")],
    column: Columns = None,
    keep: Keep = None,
    param: Params = None,
    set_: Sets = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    address: Address = None,
    save: Save = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a job or a fine-tuning job from its spec; a rerun resumes it.

    Example: hfbatch run jobs/embed.yaml --set input.path=reviews/ --limit 1000
    """
    with faults_shown(as_json, supervised=True, resumes=True) as at_end:
        from hfbatch.spec.job import JobSpec, read_yaml

        built = any_spec(read_yaml(spec), column, keep, param, set_, limit, save)
        if isinstance(built, JobSpec):
            _start(built, overwrite, address, dry_run, as_json, quiet, at_end)
        else:
            start_training(built, overwrite, address, dry_run, as_json, quiet)


def predict(
    task: Annotated[str, typer.Argument(help="Name of a task, see `hfbatch tasks`; or auto.")],
    input_: Input,
    output: Output,
    model: Model,
    column: Columns = None,
    keep: Keep = None,
    param: Params = None,
    set_: Sets = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    address: Address = None,
    save: Save = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a task over a dataset, without a spec file.

    Example: hfbatch predict text-classification reviews/ scores/ -m org/model --column text=body
    """
    with faults_shown(as_json, supervised=True, resumes=True) as at_end:
        values = {"task": task, "model": model, "input": input_, "output": output}
        job = job_spec(values, column, keep, param, set_, limit, save)
        _start(job, overwrite, address, dry_run, as_json, quiet, at_end)


def embed(
    input_: Input,
    output: Output,
    model: Model,
    column: Columns = None,
    keep: Keep = None,
    param: Params = None,
    set_: Sets = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    address: Address = None,
    save: Save = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Embed a text column; short for `predict embedding`.

    Example: hfbatch embed docs/ vectors/ -m sentence-transformers/all-MiniLM-L6-v2 --column text=body
    """
    with faults_shown(as_json, supervised=True, resumes=True) as at_end:
        values = {"task": "embedding", "model": model, "input": input_, "output": output}
        job = job_spec(values, column, keep, param, set_, limit, save)
        _start(job, overwrite, address, dry_run, as_json, quiet, at_end)


def plan(
    what: Annotated[
        list[str], typer.Argument(metavar="SPEC.yaml | TASK INPUT OUTPUT", help="As for run or predict.")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name or folder.")] = None,
    column: Columns = None,
    keep: Keep = None,
    param: Params = None,
    set_: Sets = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    address: Address = None,
    trial: Annotated[bool, typer.Option(help="Run a few rows on a worker to estimate the time.")] = True,
    as_json: Json = False,
) -> None:
    """Check a job or a fine-tuning job and estimate its time and output; changes nothing.

    Example: hfbatch plan jobs/embed.yaml --set input.path=reviews/
    """
    with faults_shown(as_json, supervised=True):
        from hfbatch.spec.job import JobSpec

        built = any_spec(_values(what, model), column, keep, param, set_, limit, None)
        if isinstance(built, JobSpec):
            _show_plan(built, overwrite, address, trial, as_json)
        else:
            plan_training(built, overwrite, address, trial, as_json)


def preview(
    spec: Annotated[str, typer.Argument(metavar="SPEC|TASK", help="A YAML spec, or a task.")],
    input_: Annotated[
        str | None, typer.Argument(metavar="[INPUT]", help="With a task: folder, file, glob or URL.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub name or folder.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=1000, help="Number of rows.")] = 5,
    column: Columns = None,
    param: Params = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """Run the first rows in this process, without Ray, and show inputs beside outputs; writes nothing.

    Example: hfbatch preview embedding reviews/ -m org/model --column text=body --rows 3
    """
    with faults_shown(as_json):
        from hfbatch.cli.preview import render, to_values
        from hfbatch.errors import SpecError
        from hfbatch.predict.preview import preview as run_preview
        from hfbatch.spec.job import JobSpec, read_yaml

        given = read_yaml(spec) if input_ is None else {"task": spec, "input": input_}
        values = {"output": "-", **given, **({"model": model} if model else {})}
        built = any_spec(values, column, None, param, set_, None, None)
        if not isinstance(built, JobSpec):
            raise SpecError(f"{spec} is a fine-tuning spec, which has no preview; use `hfbatch plan {spec}`")
        found = run_preview(built, rows)
        answer(to_values(found), as_json, lambda console: render(found, console))


def _values(what: list[str], model: str | None) -> dict[str, Any]:
    """The values of a spec file, or of three arguments. :raises SpecError: for any other number of arguments."""
    from hfbatch.errors import SpecError
    from hfbatch.spec.job import read_yaml

    match what:
        case [path]:
            return read_yaml(path) | ({"model": model} if model else {})
        case [task, source, output] if model:
            return {"task": task, "model": model, "input": source, "output": output}
        case [_, _, _]:
            raise SpecError("--model is missing; add --model ORG/MODEL, or a folder")
    raise SpecError(
        f"plan takes 1 argument or 3, not {len(what)}; write SPEC.yaml, or TASK INPUT OUTPUT --model MODEL"
    )


def _start(
    job: JobSpec,
    overwrite: bool,
    address: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    at_end: ExitStack,
) -> None:
    """Runs a job and prints its report, or prints its plan."""
    if dry_run:
        return _show_plan(job, overwrite, address, False, as_json)
    from hfbatch.output.layout import REPORT_PAGE
    from hfbatch.pages.report import summary_lines
    from hfbatch.predict.run import run as run_job

    result = run_job(
        job,
        address=address,
        overwrite=overwrite,
        quiet=quiet,
        console=screen(err=True),
        started=STARTED,
        at_end=at_end,
    )

    def render(console: Console) -> None:
        show(console, summary_lines(result.report))
        say(console, result.message)
        say(console, (f"{result.output}/{REPORT_PAGE}", "dim"))

    answer(result.report, as_json, render)
    raise typer.Exit(result.exit_code)


def _show_plan(job: JobSpec, overwrite: bool, address: str | None, trial: bool, as_json: bool) -> None:
    """Prints a plan. :param trial: run a few rows on a cluster to estimate the time."""
    from dataclasses import asdict

    from hfbatch.predict.describe import describe_plan, render_plan
    from hfbatch.predict.plan import make_plan

    made = make_plan(job, overwrite)
    shown = describe_plan(made)
    if trial and made.todo:
        from hfbatch.cluster.trial import estimate

        layout, timing = estimate(made.stage_job(), made.todo, made.workers, address)
        shown |= {"layout": asdict(layout), "trial": timing}
    answer(shown, as_json, lambda console: render_plan(shown, console))
