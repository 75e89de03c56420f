"""Commands. Each one reads its flags, then imports what it needs, so that help and faults come at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfbatch.display import say, screen, show, tell
from hfbatch.options import (
    Address,
    Columns,
    DryRun,
    Json,
    Keep,
    Limit,
    Model,
    Overwrite,
    Params,
    Quiet,
    Save,
    Sets,
    finetune_spec,
    job_spec,
)
from hfbatch.terminal import App, answer, faults_shown
from hfbatch.trainings import plan_training, start_training, training_report, training_status

if TYPE_CHECKING:
    from rich.console import Console

    from hfbatch.spec import JobSpec

STARTED = time.time()
app = App(
    help="Run any Hugging Face model over a Parquet dataset on a Ray cluster, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.command()
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
    """Run a job from its spec; a rerun goes on where it stopped.

    Example: hfbatch run jobs/embed.yaml --set input.path=reviews/ --limit 1000
    """
    with faults_shown(as_json, supervised=True):
        from hfbatch.finetune_spec import is_training
        from hfbatch.spec import read_yaml

        values = read_yaml(spec)
        if is_training(values):
            training = finetune_spec(values, column, param, set_, limit, save, keep)
            start_training(training, overwrite, address, dry_run, as_json, quiet)
        else:
            job = job_spec(values, column, keep, param, set_, limit, save)
            _start(job, overwrite, address, dry_run, as_json, quiet)


@app.command()
def predict(
    task: Annotated[str, typer.Argument(help="What to do, see `hfbatch tasks`; or auto.")],
    input_: Annotated[str, typer.Argument(metavar="INPUT", help="Folder, file, glob or URL.")],
    output: Annotated[str, typer.Argument(help="Output folder or URL.")],
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
    with faults_shown(as_json, supervised=True):
        values = {"task": task, "model": model, "input": input_, "output": output}
        job = job_spec(values, column, keep, param, set_, limit, save)
        _start(job, overwrite, address, dry_run, as_json, quiet)


@app.command()
def embed(
    input_: Annotated[str, typer.Argument(metavar="INPUT", help="Folder, file, glob or URL.")],
    output: Annotated[str, typer.Argument(help="Output folder or URL.")],
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
    with faults_shown(as_json, supervised=True):
        values = {"task": "embedding", "model": model, "input": input_, "output": output}
        job = job_spec(values, column, keep, param, set_, limit, save)
        _start(job, overwrite, address, dry_run, as_json, quiet)


@app.command()
def finetune(
    task: Annotated[str, typer.Argument(help="What to learn, such as text-classification.")],
    train: Annotated[str, typer.Argument(help="Folder, file, glob or URL of rows with labels.")],
    output: Annotated[str, typer.Argument(help="Output folder or URL.")],
    model: Model,
    eval_: Annotated[
        str | None, typer.Option("--eval", help="Rows to measure with; default: a tenth of the others.")
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
    """Fine-tune a model on rows with labels; a rerun goes on from the newest checkpoint.

    Example: hfbatch finetune text-classification train/ out/ -m org/model --eval dev/ --column label=stars
    """
    with faults_shown(as_json, supervised=True):
        given = {
            "task": task,
            "model": model,
            "train": train,
            "output": output,
            "eval": eval_,
            "method": method,
        }
        values = {name: value for name, value in given.items() if value is not None}
        training = finetune_spec(values, column, param, set_, limit, save)
        start_training(training, overwrite, address, dry_run, as_json, quiet)


@app.command()
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
    trial: Annotated[bool, typer.Option(help="Try a few rows on a worker to foretell the time.")] = True,
    as_json: Json = False,
) -> None:
    """Check a job or a fine-tuning and foretell its time and what comes out; changes nothing.

    Example: hfbatch plan jobs/embed.yaml --set input.path=reviews/
    """
    with faults_shown(as_json, supervised=True):
        from hfbatch.errors import SpecError
        from hfbatch.finetune_spec import is_training
        from hfbatch.spec import read_yaml

        if len(what) == 1:
            values = read_yaml(what[0]) | ({"model": model} if model else {})
        elif len(what) == 3 and model:
            values = {"task": what[0], "model": model, "input": what[1], "output": what[2]}
        elif len(what) == 3:
            raise SpecError("--model is missing; add --model ORG/MODEL, or a folder")
        else:
            raise SpecError("give SPEC.yaml, or TASK INPUT OUTPUT --model MODEL")
        if is_training(values):
            training = finetune_spec(values, column, param, set_, limit, None, keep)
            plan_training(training, overwrite, address, trial, as_json)
        else:
            job = job_spec(values, column, keep, param, set_, limit, None)
            _show_plan(job, overwrite, address, trial, as_json)


@app.command()
def status(out: Annotated[str, typer.Argument(help="An output folder.")], as_json: Json = False) -> None:
    """Say how far the job or the fine-tuning of an output folder is.

    Example: hfbatch status vectors/
    """
    with faults_shown(as_json):
        from hfbatch.status import is_training, read_status, render_status

        if is_training(out):
            training_status(out, as_json)
        else:
            found = read_status(out)
            answer(found, as_json, lambda console: render_status(found, console))


@app.command()
def verify(
    out: Annotated[str, typer.Argument(help="An output folder.")],
    input_: Annotated[
        str | None, typer.Option("--input", help="Where the input is now, if it has moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Re-read every part and compare it with the input; exit code 1 and the list if anything is wrong.

    Example: hfbatch verify vectors/ --input docs/
    """
    with faults_shown(as_json):
        from hfbatch.verify import verify_output

        faults = verify_output(out, input_)

        def render(console: Console) -> None:
            for fault in faults:
                tell(console, "✗", "red", fault)
            if not faults:
                tell(console, "✓", "green", "every row is there exactly once")

        answer({"ok": not faults, "faults": faults}, as_json, render)
        raise typer.Exit(1 if faults else 0)


@app.command()
def report(out: Annotated[str, typer.Argument(help="An output folder.")], as_json: Json = False) -> None:
    """Show the report of the last run and say where its page lies.

    Example: hfbatch report vectors/
    """
    with faults_shown(as_json):
        from hfbatch.errors import redact
        from hfbatch.report import summary_lines
        from hfbatch.status import is_training, read_report

        def render(console: Console) -> None:
            show(console, summary_lines(found))
            say(console, f"{redact(out).rstrip('/')}/_hfbatch/report.html")

        if is_training(out):
            training_report(out, as_json)
        else:
            found = read_report(out)
            answer(found, as_json, render)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="One task, in full.")] = None, as_json: Json = False
) -> None:
    """List the tasks, or show one: other names, inputs, params with defaults, output, an example.

    Example: hfbatch tasks text-classification
    """
    with faults_shown(as_json):
        from hfbatch.catalogue import describe_task, list_tasks, render_task, render_tasks

        if name:
            task = describe_task(name)
            answer(task, as_json, lambda console: render_task(task, console))
        else:
            found = list_tasks()
            answer(found, as_json, lambda console: render_tasks(found, console))


@app.command()
def attention(
    text: Annotated[str, typer.Argument(help="What the model reads.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("attention.png"),
    layer: Annotated[int | None, typer.Option(help="This layer alone, from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="This head alone, from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Draw which tokens of a text look at which, for each layer and head.

    Example: hfbatch attention "The cat sat on the mat." -m org/model --layer 3 --head 0 --out cat.svg
    """
    with faults_shown(as_json):
        from hfbatch.attention import check_ending, draw
        from hfbatch.compute.attention import attention_of

        check_ending(out)
        found = attention_of(text, model)
        draw(found, out, layer, head)
        layers, heads, tokens, _ = found.weights.shape
        values = {"out": str(out), "layers": layers, "heads": heads, "tokens": found.tokens}
        line = f"{out}: {layers} layers × {heads} heads over {tokens} tokens"
        answer(values, as_json, lambda console: say(console, line))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, precision, Ray, what is missing and how to get it.

    Example: hfbatch doctor
    """
    with faults_shown(as_json, supervised=True):
        from hfbatch.doctor import examine, render, to_values

        checks = examine()
        answer(to_values(checks), as_json, lambda console: render(checks, console))
        raise typer.Exit(1 if any(check.status == "missing" for check in checks) else 0)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put everything.")] = Path("hfbatch-demo"),
) -> None:
    """Embed the docstrings of this Python and search them; needs no network.

    Example: hfbatch demo
    """
    with faults_shown(False, supervised=True):
        from hfbatch.demo import run_demo

        raise typer.Exit(run_demo(folder, screen()))


def _start(
    job: JobSpec, overwrite: bool, address: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    if dry_run:
        return _show_plan(job, overwrite, address, False, as_json)
    from hfbatch.job import run as run_job
    from hfbatch.report import summary_lines

    result = run_job(
        job, address=address, overwrite=overwrite, quiet=quiet, console=screen(err=True), started=STARTED
    )

    def render(console: Console) -> None:
        show(console, summary_lines(result.report))
        say(console, result.message)
        say(console, (f"{result.output}/_hfbatch/report.html", "dim"))

    answer(result.report, as_json, render)
    raise typer.Exit(result.exit_code)


def _show_plan(job: JobSpec, overwrite: bool, address: str | None, trial: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from hfbatch.describe import describe_plan, render_plan
    from hfbatch.plan import make_plan

    made = make_plan(job, overwrite)
    shown = describe_plan(made)
    if trial and made.todo:
        from hfbatch.cluster.probe import foretell

        layout, outlook = foretell(made, address)
        shown |= {"layout": asdict(layout), "trial": outlook}
    answer(shown, as_json, lambda console: render_plan(shown, console))
