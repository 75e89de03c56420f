"""What the commands do where a spec or an output is that of a fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbatch.display import say, screen
from hfbatch.errors import redact
from hfbatch.terminal import answer

if TYPE_CHECKING:
    from rich.console import Console

    from hfbatch.finetune_spec import FinetuneSpec


def start_training(
    spec: FinetuneSpec, overwrite: bool, address: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Trains, and prints the best figures; or prints the plan."""
    if dry_run:
        plan_training(spec, overwrite, address, False, as_json)
        return
    from hfbatch.finetune import finetune
    from hfbatch.train.card import command_of
    from hfbatch.train.describe import render_figures

    result = finetune(spec, address=address, overwrite=overwrite, quiet=quiet, console=screen(err=True))

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
    """Prints what the training will be. :param trial: look at all rows and take a few steps on a cluster."""
    from hfbatch.cluster.session import ceiling, connect, nodes
    from hfbatch.train.describe import render_outlook
    from hfbatch.train.outlook import describe_training, try_training
    from hfbatch.train.plan import make_finetune_plan

    plan = make_finetune_plan(spec, overwrite)
    if trial:
        with connect(address):
            shown = try_training(plan, nodes(), ceiling())
    else:
        shown = describe_training(plan)
    answer(shown, as_json, lambda console: render_outlook(shown, console))


def training_status(out: str, as_json: bool) -> None:
    """Prints how far a training is."""
    from hfbatch.train.describe import render_state
    from hfbatch.train.status import read_training

    found = read_training(out)
    answer(found, as_json, lambda console: render_state(found, console))


def training_report(out: str, as_json: bool) -> None:
    """Prints the figures of a finished training, and where its page lies."""
    from hfbatch.train.describe import render_figures
    from hfbatch.train.status import read_metrics

    metrics = read_metrics(out)

    def show(console: Console) -> None:
        render_figures(metrics, console)
        say(console, f"{redact(out).rstrip('/')}/report.html")

    answer(metrics, as_json, show)
