"""The commands around jobs: tasks, engines, cache, attention, doctor, demo, docs, schema."""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from hfbatch.cli.options import Columns, Json, Model, Params, Sets, job_spec
from hfbatch.cli.terminal import answer, faults_shown
from hfbatch.console.display import say, screen


def tasks(
    name: Annotated[str | None, typer.Argument(help="A task to show in full.")] = None, as_json: Json = False
) -> None:
    """List the tasks, or show one: aliases, inputs, params with defaults, outputs, an example.

    Example: hfbatch tasks text-classification
    """
    with faults_shown(as_json):
        from hfbatch.cli.catalogue import describe_task, list_tasks, render_task, render_tasks

        if name:
            task = describe_task(name)
            answer(task, as_json, lambda console: render_task(task, console))
        else:
            found = list_tasks()
            answer(found, as_json, lambda console: render_tasks(found, console))


def engines(as_json: Json = False) -> None:
    """List the engines: what each computes in and on, and whether it is installed here.

    Example: hfbatch engines
    """
    with faults_shown(as_json):
        from hfbatch.cli.engines import list_engines, render_engines

        found = list_engines()
        answer(found, as_json, lambda console: render_engines(found, console))


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them.")] = False, as_json: Json = False
) -> None:
    """List the models that engines have exported on this machine, or delete them.

    Example: hfbatch cache --clear
    """
    with faults_shown(as_json):
        from hfbatch.cli.engines import clear_exports, list_exports, render_exports

        found = clear_exports() if clear else list_exports()
        answer(found, as_json, lambda console: render_exports(found, console))


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder.")],
    out: Annotated[str, typer.Argument(help="Folder to write; it must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            help="Quantisation: int8, nf4, fp4, int8_weight_only or int8_dynamic; of a graph int8, or none."
        ),
    ],
    rows: Annotated[str, typer.Option(help="Folder, file, glob or URL of rows to compare with float32.")],
    engine: Annotated[
        str, typer.Option(help="torch: weights of transformers; openvino, onnx: a graph for that engine.")
    ] = "torch",
    task: Annotated[str, typer.Option(help="Name of the task; auto: decided by the model's files.")] = "auto",
    column: Columns = None,
    param: Params = None,
    set_: Sets = None,
    as_json: Json = False,
) -> None:
    """Write a model with quantised weights, or as a graph, to a folder, with a card that compares it with float32.

    Example: hfbatch quantize org/model model-int8 --to int8 --rows reviews/ --column text=body
    """
    with faults_shown(as_json):
        from hfbatch.cli.engines import render_quantized
        from hfbatch.errors import SpecError
        from hfbatch.predict.quantize import quantize as run
        from hfbatch.predict.quantize import unwritable

        if faults := unwritable(engine):
            raise SpecError(faults)
        section = {"name": engine, "quantization": to}
        values = {"task": task, "model": model, "input": rows, "output": out, "engine": section}
        found = run(job_spec(values, column, None, param, set_, None, None))
        answer(asdict(found), as_json, lambda console: render_quantized(found, console))


def attention(
    text: Annotated[str, typer.Argument(help="Input of the model.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="The image to write, .png or .svg.")] = Path("attention.png"),
    layer: Annotated[int | None, typer.Option(help="Only this layer, from 0.")] = None,
    head: Annotated[int | None, typer.Option(help="Only this head, from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Plot the attention weights between the tokens of a text, for each layer and head.

    Example: hfbatch attention "The cat sat on the mat." -m org/model --layer 3 --head 0 --out cat.svg
    """
    with faults_shown(as_json):
        from hfbatch.pages.attention import check_ending, draw
        from hfbatch.runtime.attention import attention_of

        check_ending(out)
        found = attention_of(text, model)
        draw(found, out, layer, head)
        layers, heads, tokens, _ = found.weights.shape
        values = {"out": str(out), "layers": layers, "heads": heads, "tokens": found.tokens}
        line = f"{out}: {layers} layers × {heads} heads over {tokens} tokens"
        answer(values, as_json, lambda console: say(console, line))


def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, precision, Ray; report what is missing and how to install it.

    Example: hfbatch doctor
    """
    with faults_shown(as_json, supervised=True):
        from hfbatch.cli.doctor import render, run_checks, to_values

        checks = run_checks()
        answer(to_values(checks), as_json, lambda console: render(checks, console))
        raise typer.Exit(1 if any(check.status == "missing" for check in checks) else 0)


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for corpus, spec and output.")] = Path(
        "hfbatch-demo"
    ),
    generate: Annotated[
        bool, typer.Option("--generate", help="Answer chats with a small language model instead.")
    ] = False,
) -> None:
    """Embed the docstrings of this Python and search them; needs no network.

    Example: hfbatch demo
    """
    with faults_shown(False, supervised=True, resumes=True):
        if generate:
            from hfbatch.cli.demo_generate import run_generate_demo as run
        else:
            from hfbatch.cli.demo import run_demo as run

        raise typer.Exit(run(folder, screen()))


def docs(
    topic: Annotated[str | None, typer.Argument(help="A topic to show in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the topics of the documentation, or show one: formatted on a terminal, else as Markdown.

    Example: hfbatch docs troubleshooting
    """
    with faults_shown(as_json):
        from hfbatch.cli.docs import list_topics, read_topic, render_topics
        from hfbatch.console.display import markdown

        if topic:
            text = read_topic(topic)
            answer({"topic": topic, "text": text}, as_json, lambda console: markdown(console, text))
        else:
            found = list_topics()
            answer(found, as_json, lambda console: render_topics(found, console))


def schema(
    kind: Annotated[
        str | None, typer.Argument(metavar="[job|finetune|serve]", help="Kind of spec; default: all.")
    ] = None,
) -> None:
    """Print the JSON Schema of specs, with which editors complete and check YAML.

    Example: hfbatch schema job
    """
    with faults_shown(False):
        from hfbatch.errors import SpecError
        from hfbatch.spec.schema import KINDS, json_schema

        if kind is not None and kind not in KINDS:
            alike = "".join(f"; did you mean {near!r}?" for near in get_close_matches(kind, KINDS, 1))
            raise SpecError(f"unknown kind of spec {kind!r}; choose one of: {', '.join(KINDS)}{alike}")
        answer(json_schema(kind), True, None)
