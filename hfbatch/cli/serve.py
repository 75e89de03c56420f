"""`hfbatch serve`: endpoints from specs, or from a task and a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hfbatch.cli.options import Address, DryRun, Json, Params, Sets, serve_specs
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import add, facts, say, screen, show

if TYPE_CHECKING:
    from rich.console import Console

    from hfbatch.serve.plan import ServePlan


def serve(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC.yaml... | TASK", help="Specs of endpoints or jobs, or the name of a task."
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub name or folder, with a task.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: 8000.")] = None,
    param: Params = None,
    set_: Sets = None,
    address: Address = None,
    check: Annotated[
        int | None,
        typer.Option(
            min=1, help="Send this many concurrent requests, ten times, print the latency, and end."
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Answer requests over HTTP with the same steps as a job: rows at /predict, and the OpenAI API at /v1.

    Example: hfbatch serve embedding --model sentence-transformers/all-MiniLM-L6-v2 --port 8000
    """
    with faults_shown(as_json):
        from hfbatch.serve.plan import make_plan

        specs = serve_specs(what, model, host, port, param, set_)
        plans = [make_plan(spec) for spec in specs]
        if dry_run:
            answer([plan.to_values() for plan in plans], as_json, lambda console: _show(plans, console))
            return
        from hfbatch.serve.run import serve_until_ended, serving

        if check:
            from hfbatch.serve.check import render, run_check

            with serving(plans, address) as urls:
                loads = [run_check(plan, url, check) for plan, url in zip(plans, urls, strict=True)]
            answer([load.to_values() for load in loads], as_json, lambda console: render(loads, console))
            raise typer.Exit(0 if all(set(load.statuses) == {200} for load in loads) else 1)
        serve_until_ended(plans, address, lambda urls: _say_ready(plans, urls, as_json))


def _say_ready(plans: list[ServePlan], urls: list[str], as_json: bool) -> None:
    """Names what answers: as JSON on stdout, else in lines on stderr."""
    if as_json:
        answer({"urls": urls}, True, None)
        return
    console = screen(err=True)
    for plan, url in zip(plans, urls, strict=True):
        for note in plan.notes:
            say(console, f"note: {note}")
        named = f"{plan.spec.serve.name} ({plan.spec.task})"
        say(console, f"serving {named} at {url}; its API: {url}/docs", wrap=False)


def _show(plans: list[ServePlan], console: Console) -> None:
    about = facts()
    for name, value in (item for plan in plans for item in plan.to_values().items()):
        if name == "notes":
            for note in value:
                add(about, "note", note)
        else:
            add(
                about,
                name,
                f"{value['name']} @ {value['commit'][:12]}" if isinstance(value, dict) else str(value),
            )
    show(console, about)
