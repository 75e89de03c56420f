"""Flags that several commands share, and the spec that they mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from hfbatch.display import say, screen

if TYPE_CHECKING:
    from hfbatch.finetune_spec import FinetuneSpec
    from hfbatch.spec import JobSpec, Spec

S = TypeVar("S", bound="Spec")

Model = Annotated[str, typer.Option("--model", "-m", help="Hub name or folder.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Task input = dataset column, such as text=body; repeat.")
]
Keep = Annotated[
    list[str] | None, typer.Option(help="Input columns to keep, such as id,lang; default: all; repeat.")
]
Params = Annotated[
    list[str] | None,
    typer.Option("--param", help="Option of the task, NAME=VALUE; `hfbatch tasks TASK` lists them; repeat."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of the spec, such as batch.size=64; repeat.")
]
Limit = Annotated[int | None, typer.Option(help="Read only the first N rows.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what another job left in the output.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; default: one that runs already, else a local one.")
]
Save = Annotated[Path | None, typer.Option(help="Also write the spec that the flags mean.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, start nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def job_spec(
    values: dict[str, Any],
    column: list[str] | None,
    keep: list[str] | None,
    param: list[str] | None,
    set_: list[str] | None,
    limit: int | None,
    save: Path | None,
) -> JobSpec:
    """The spec of a job over a dataset: a file or arguments, then flags. :raises SpecError: with every fault."""
    from hfbatch.spec import JobSpec

    flags = _flags(["input"], column, param, limit)
    flags += [f"output.keep=[{','.join(keep)}]"] if keep else []
    return _built(JobSpec, values, [*flags, *(set_ or [])], save)


def finetune_spec(
    values: dict[str, Any],
    column: list[str] | None,
    param: list[str] | None,
    set_: list[str] | None,
    limit: int | None,
    save: Path | None,
    keep: list[str] | None = None,
) -> FinetuneSpec:
    """The spec of a fine-tuning, likewise; columns are those of both sets of rows. A flag `keep` is refused."""
    from hfbatch.errors import SpecError
    from hfbatch.finetune_spec import FinetuneSpec

    if keep:
        raise SpecError("--keep is for jobs, which write rows; a fine-tuning writes a model: leave it out")
    given = [part for part in ("train", "eval") if values.get(part) is not None]
    flags = _flags(given, column, param, limit)
    return _built(FinetuneSpec, values, [*flags, *(set_ or [])], save)


def _flags(
    parts: list[str], column: list[str] | None, param: list[str] | None, limit: int | None
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
    from hfbatch.spec import apply_overrides

    spec = kind.build(apply_overrides(values, overrides))
    if save:
        _write(spec, save)
    return spec


def _write(spec: Spec, path: Path) -> None:
    """Writes a spec, so that it can run; nobody else may read one that holds a secret."""
    text = spec.to_yaml(secrets=True)
    if text == spec.to_yaml():
        path.write_text(text, encoding="utf8")
        return
    with open(path, "a", encoding="utf8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(0)
        file.write(text)
    say(screen(err=True), f"{path} holds a secret of a URL; nobody else may read it (mode 0600)")
