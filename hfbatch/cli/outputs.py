"""The commands that read an output folder: status, verify, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hfbatch.cli.finetune import training_report, training_status
from hfbatch.cli.options import Json, Out
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import say, say_marked, show

if TYPE_CHECKING:
    from rich.console import Console


def status(out: Out, as_json: Json = False) -> None:
    """Show the progress of a job or a fine-tuning job.

    Example: hfbatch status vectors/
    """
    with faults_shown(as_json):
        from hfbatch.predict.status import is_training, read_status, render_status

        if is_training(out):
            training_status(out, as_json)
        else:
            found = read_status(out)
            answer(found, as_json, lambda console: render_status(found, console))


def verify(
    out: Out,
    input_: Annotated[
        str | None, typer.Option("--input", help="Current location of the input, if it was moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every part again and compare it with the input; list differences and exit with code 1 if there are any.

    Example: hfbatch verify vectors/ --input docs/
    """
    with faults_shown(as_json):
        from hfbatch.predict.verify import verify_output

        faults = verify_output(out, input_)

        def render(console: Console) -> None:
            for fault in faults:
                say_marked(console, "✗", "red", fault)
            if not faults:
                say_marked(console, "✓", "green", "every row is there exactly once")

        answer({"ok": not faults, "faults": faults}, as_json, render)
        raise typer.Exit(1 if faults else 0)


def report(out: Out, as_json: Json = False) -> None:
    """Show the report of the last run and the location of its HTML page.

    Example: hfbatch report vectors/
    """
    with faults_shown(as_json):
        from hfbatch.errors import redact
        from hfbatch.output.layout import REPORT_PAGE
        from hfbatch.pages.report import summary_lines
        from hfbatch.predict.status import is_training, read_report

        def render(console: Console) -> None:
            show(console, summary_lines(found))
            say(console, f"{redact(out).rstrip('/')}/{REPORT_PAGE}")

        if is_training(out):
            training_report(out, as_json)
        else:
            found = read_report(out)
            answer(found, as_json, render)
