"""The command finetune, and what run, plan, status and report do for fine-tuning jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hfbatch.cli.options import (
    Address,
    Columns,
    DryRun,
    Json,
    Limit,
    Model,
    Output,
    Overwrite,
    Params,
    Quiet,
    Save,
    Sets,
    finetune_spec,
)
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import say, screen
from hfbatch.errors import redact

if TYPE_CHECKING:
    from rich.console import Console

    from hfbatch.spec.finetune import FinetuneSpec


def finetune(
    task: Annotated[str, typer.Argument(help="Name of a task, such as text-classification.")],
    train: Annotated[str, typer.Argument(help="Labelled rows to train on: folder, file, glob or URL.")],
    output: Output,
    model: Model,
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Rows to evaluate on; default: a tenth of the training rows.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="full, head, lora or qlora.")] = None,
    column: Columns = None,
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
    """Fine-tune a model on labelled rows; a rerun resumes from the latest checkpoint.

    Example: hfbatch finetune text-classification train/ out/ -m org/model --eval dev/ --column label=stars
    """
    with faults_shown(as_json, supervised=True, resumes=True):
        given = {
            "task": task,
            "model": model,
            "train": train,
            "output": output,
            "eval": eval_,
            "method": method,
        }
        values = {name: value for name, value in given.items() if value is not None}
        training = finetune_spec(values, column, None, param, set_, limit, save)
        start_training(training, overwrite, address, dry_run, as_json, quiet)


def start_training(
    spec: FinetuneSpec, overwrite: bool, address: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Trains and prints the best metrics, or prints the plan."""
    if dry_run:
        plan_training(spec, overwrite, address, False, as_json)
        return
    from hfbatch.cli.tables import render_figures
    from hfbatch.pages.model_card import command_of
    from hfbatch.train.run import finetune as run_finetune

    result = run_finetune(spec, address=address, overwrite=overwrite, quiet=quiet, console=screen(err=True))

    def show(console: Console) -> None:
        if result.finished:
            say(console, "this training is done already; nothing to do")
        render_figures(result.metrics, console)
        say(console, result.model)
        say(console, (f"Use it     {command_of(result.metrics, result.model)}", "dim"), wrap=False)
        say(console, (f"Report     {result.output}/report.html", "dim"))

    answer(result.metrics, as_json, show)


def plan_training(
    spec: FinetuneSpec, overwrite: bool, address: str | None, trial: bool, as_json: bool
) -> None:
    """Prints the plan of a training. :param trial: read all rows and run a few steps on a cluster."""
    from hfbatch.cli.tables import render_estimate
    from hfbatch.cluster.session import ceiling, connect, nodes
    from hfbatch.train.estimate import describe_training, try_training
    from hfbatch.train.plan import make_finetune_plan

    plan = make_finetune_plan(spec, overwrite)
    if trial:
        with connect(address):
            shown = try_training(plan, nodes(), ceiling())
    else:
        shown = describe_training(plan)
    answer(shown, as_json, lambda console: render_estimate(shown, console))


def training_status(out: str, as_json: bool) -> None:
    """Prints the progress of a training."""
    from hfbatch.cli.tables import render_state
    from hfbatch.train.status import read_training

    found = read_training(out)
    answer(found, as_json, lambda console: render_state(found, console))


def training_report(out: str, as_json: bool) -> None:
    """Prints the metrics of a finished training and the location of its HTML page."""
    from hfbatch.cli.tables import render_figures
    from hfbatch.train.status import read_metrics

    metrics = read_metrics(out)

    def show(console: Console) -> None:
        render_figures(metrics, console)
        say(console, f"{redact(out).rstrip('/')}/report.html")

    answer(metrics, as_json, show)
