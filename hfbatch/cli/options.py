"""Flags that several commands share, and the spec that a command line stands for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hfbatch.console.display import say, screen

if TYPE_CHECKING:
    from hfbatch.spec.finetune import FinetuneSpec
    from hfbatch.spec.job import JobSpec, ServeSpec, Spec

S = TypeVar("S", bound="Spec")

Input = Annotated[str, typer.Argument(metavar="INPUT", help="Folder, file, glob or URL.")]
Output = Annotated[str, typer.Argument(help="Output folder or URL.")]
Out = Annotated[str, typer.Argument(help="Output folder of a job or a fine-tuning job.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub name or folder.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Task input = dataset column, such as text=body; repeatable."),
]
Keep = Annotated[
    list[str] | None, typer.Option(help="Input columns to keep, such as id,lang; default: all; repeatable.")
]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", help="Option of the task, NAME=VALUE; see `hfbatch tasks TASK`; repeatable."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of the spec, such as batch.size=64; repeatable.")
]
Limit = Annotated[int | None, typer.Option(help="Read the first N rows only.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of another job in the output.")
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; default: a running one, else a new local one.")
]
Save = Annotated[Path | None, typer.Option(help="Write the spec that this command line stands for.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def any_spec(
    values: dict[str, Any],
    column: list[str] | None,
    keep: list[str] | None,
    param: list[str] | None,
    set_: list[str] | None,
    limit: int | None,
    save: Path | None,
) -> JobSpec | FinetuneSpec:
    """The spec of a file and flags, of the kind that its keys indicate. :raises SpecError: with every fault."""
    from hfbatch.spec.finetune import is_training

    build = finetune_spec if is_training(values) else job_spec
    return build(values, column, keep, param, set_, limit, save)


def job_spec(
    values: dict[str, Any],
    column: list[str] | None,
    keep: list[str] | None,
    param: list[str] | None,
    set_: list[str] | None,
    limit: int | None,
    save: Path | None,
) -> JobSpec:
    """The spec of a job: a file or arguments, then flags. :raises SpecError: with every fault."""
    from hfbatch.spec.job import JobSpec

    flags = _flags(["input"], column, param, limit)
    flags += [f"output.keep=[{','.join(keep)}]"] if keep else []
    return _built(JobSpec, values, [*flags, *(set_ or [])], save)


def finetune_spec(
    values: dict[str, Any],
    column: list[str] | None,
    keep: list[str] | None,
    param: list[str] | None,
    set_: list[str] | None,
    limit: int | None,
    save: Path | None,
) -> FinetuneSpec:
    """The spec of a fine-tuning job. Columns apply to training and evaluation rows; a flag `keep` is refused."""
    from hfbatch.errors import SpecError
    from hfbatch.spec.finetune import FinetuneSpec

    if keep:
        raise SpecError("--keep applies to jobs that write rows; fine-tuning writes a model: remove --keep")
    given = [part for part in ("train", "eval") if values.get(part) is not None]
    flags = _flags(given, column, param, limit)
    return _built(FinetuneSpec, values, [*flags, *(set_ or [])], save)


def serve_specs(
    what: list[str],
    model: str | None,
    host: str | None,
    port: int | None,
    param: list[str] | None,
    set_: list[str] | None,
) -> list[ServeSpec]:
    """The specs of a command line. :raises SpecError: with every fault."""
    from hfbatch.errors import SpecError
    from hfbatch.spec.job import ServeSpec, apply_overrides, read_yaml

    wrong = [
        f"--param {pair!r} has no value; write --param {pair}=VALUE"
        for pair in param or []
        if "=" not in pair
    ]
    flags = [f"params.{pair}" for pair in param or []]
    flags += [f"serve.host={host}"] if host else []
    flags += [f"serve.port={port}"] if port else []
    files = [Path(name).suffix in (".yaml", ".yml") for name in what]
    if not all(files) and (len(what) > 1 or model is None):
        wrong.append("give specs (FILE.yaml), or one TASK with --model MODEL")
    if all(files) and model is not None:
        flags.append(f"model.name={model}")
    if wrong:
        raise SpecError(wrong)
    given: list[dict[str, Any]] = (
        [read_yaml(name) for name in what] if all(files) else [{"task": what[0], "model": model}]
    )
    specs = [ServeSpec.build(apply_overrides(values, [*flags, *(set_ or [])])) for values in given]
    listening = {(one.host, one.port, one.token_env, one.proxy) for one in (spec.serve for spec in specs)}
    names = [spec.serve.name for spec in specs]
    if len(listening) > 1:
        raise SpecError(
            "the specs name different serve.host, port, token_env or proxy; endpoints of one command share them"
        )
    if len(specs) > 1 and (len(set(names)) < len(names) or not all(names)):
        raise SpecError("several endpoints need different names; set serve.name in each spec")
    return specs


def _flags(
    parts: Sequence[str], column: list[str] | None, param: list[str] | None, limit: int | None
) -> list[str]:
    """Flags as overrides of a spec. :param parts: the sections that name columns; the first has the limit."""
    from hfbatch.errors import SpecError

    wrong = [f"--column {pair!r}: write --column text={pair}" for pair in column or [] if "=" not in pair]
    wrong += [
        f"--param {pair!r} has no value; write --param {pair}=VALUE"
        for pair in param or []
        if "=" not in pair
    ]
    if wrong:
        raise SpecError(wrong)
    pairs = [pair.partition("=")[::2] for pair in column or []]
    flags = [f"{part}.columns.{name}={json.dumps(of)}" for part in parts for name, of in pairs]
    flags += [f"params.{pair}" for pair in param or []]
    return flags + ([] if limit is None else [f"{parts[0]}.limit={limit}"])


def _built(kind: type[S], values: dict[str, Any], overrides: list[str], save: Path | None) -> S:
    from hfbatch.spec.job import apply_overrides

    spec = kind.build(apply_overrides(values, overrides))
    if save:
        _write(spec, save)
    return spec


def _write(spec: Spec, path: Path) -> None:
    """Writes a spec with its secrets, so that it can run; only the owner can read a file that holds any."""
    text = spec.to_yaml(secrets=True)
    if text == spec.to_yaml():
        path.write_text(text, encoding="utf8")
        return
    with open(path, "a", encoding="utf8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(0)
        file.write(text)
    say(screen(err=True), f"{path} holds a secret of a URL; only its owner can read it (mode 0600)")
