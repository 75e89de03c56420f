"""Writes a model with quantised weights, or as a graph, to a folder, with a card that holds its comparison with float32."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import yaml

from hfbatch._version import __version__
from hfbatch.data.filesystem import is_url
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.engines import ENGINES
from hfbatch.engines.base import Engine
from hfbatch.engines.exports import KEY
from hfbatch.engines.quantization import save
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import GRAPH_FILES, PICKLES, Model, files_in
from hfbatch.output.rejects import unreadable
from hfbatch.pages.model_card import as_markdown, fenced
from hfbatch.predict.bind import bind
from hfbatch.predict.preview import first_rows
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import Verdict
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec, ModelSpec, TokenizerSpec
from hfbatch.tasks.sentence_modules import is_stanford

ROWS = 512
"""Rows of the input, of which the comparison takes some."""
WEIGHTS = (*PICKLES, *GRAPH_FILES, "*.safetensors", "*.index.json")
"""Files that are not copied from the model."""
DENSE = re.compile(r"\d+_\w+/model\.safetensors")
"""Weights of the pooling, which are."""
OLD_TOKENIZER = ("added_tokens.json", "special_tokens_map.json")
"""Files of a tokenizer that are now part of tokenizer_config.json, where it has been saved anew with other tokens."""
CARD = """---
{data}---

# {title} {form}

{source} Task of the comparison: {task}.

{summary}.

{table}
## How to use it

{command}
"""


@dataclass
class Quantized:
    """A folder with a quantised model, or a graph."""

    out: str
    engine: str
    quantization: str
    bytes_before: int
    """Bytes of the weights of the model."""
    bytes: int
    guard: dict[str, Any] | None
    """The comparison with float32, see `Verdict`."""


def quantize(spec: JobSpec) -> Quantized:
    """Quantises the model as `spec.engine` says, compares it with float32 on rows of the input, and saves it.

    Engines that run a graph write that graph; without quantisation, it has been compared with the model when it was exported.

    :param spec: of a job; its output is the folder to write, which must not exist.
    :raises SpecError: with every fault of the spec.
    :raises WorkerError: if the results differ too much from those in float32; nothing is written then.
    """
    out = Path(spec.output.path)
    faults = [f"{out} exists; choose another folder"] if os.path.lexists(out) else []
    if is_url(spec.output.path):
        faults.append(f"{spec.output.path} is a URL; give a folder of this machine")
    faults += _engine_faults(spec)
    name = spec.engine.name
    if exports := name in ENGINES and ENGINES[name].exports:
        spec = spec.model_copy(update={"model": _in_float32(spec)})
    bound = bind(spec.model_copy(update={"input": with_absolute_paths(spec.input)}), None, faults)
    if bound is not None and bound.model.graphs:
        faults.append(f"model {bound.model.name!r} is a graph already, which engine {name} runs as it is")
    if bound is not None and is_stanford(bound.model):
        faults.append(
            f"model {bound.model.name!r} has its projection among the weights, and a written model would lack it; save it once "
            "with MultiVectorEncoder of sentence-transformers, and give that folder"
        )
    if faults or bound is None:
        raise SpecError(list(dict.fromkeys(faults)))
    rows = first_rows(bound, ROWS)
    columns = arrays_of(rows.table, bound.inputs)
    runner = Runner(RunnerConfig.of(bound.spec, bound.model, bound.source.root_url))
    runner.load()
    prepared = runner.preprocess(columns, rows.places, unreadable(rows))
    if not len(prepared.features):
        first = prepared.rejects[0].message
        raise SpecError(f"none of the first {len(rows.table)} rows can be compared: {first}; give other rows")
    runner.prepare(cast(Engine, runner.engine), prepared.features)
    verdict = runner.guard(prepared.features, len(rows.table), columns)
    size = runner.task.model.size()[1]
    with _made(out) as made:
        if exports:
            stored = _copy_graph(cast(Any, runner.engine).model.folders, made)
        else:
            runner.load()  # anew: a call of the model can change how its weights are kept
            save(cast(Any, runner.engine).model, made)
            stored = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        if spec.tokenizer != TokenizerSpec():
            runner.task.tokenizer.save_pretrained(made)
        _copy_others(Path(runner.task.model.folder), made)
        card = _card(bound.spec, bound.model, verdict, out)
        (made / "README.md").write_text(card, encoding="utf8")
    quantization = bound.spec.engine.quantization
    return Quantized(str(out), name, quantization, size, stored, asdict(verdict) if verdict else None)


def unwritable(engine: str) -> list[str]:
    """Returns an error for an engine, by name, that writes no models."""
    able = [name for name, kind in ENGINES.items() if kind.exports or name == "torch"]
    return (
        []
        if engine in able
        else [f"engine {engine} writes no model of its own; use engine {' or '.join(able)}"]
    )


def _engine_faults(spec: JobSpec) -> list[str]:
    """Returns errors for an engine whose model cannot be written, or which would write the model that is there."""
    engine = spec.engine
    if faults := unwritable(engine.name):
        return faults
    if engine.name == "torch":
        none = engine.quantization == "none"
        return ["engine.quantization none names no quantisation; give one, such as int8"] if none else []
    if spec.tokenizer != TokenizerSpec():
        return [
            f"tokenizer: a graph of engine {engine.name} is written with the model's own; leave changes out"
        ]
    return []


def _in_float32(spec: JobSpec) -> ModelSpec:
    """Returns the model in the dtype that a graph in a folder is run in, unless the spec names another."""
    dtype = spec.model.dtype
    return spec.model.model_copy(update={"dtype": "float32" if dtype == "auto" else dtype})


def _copy_graph(folders: list[Path], made: Path) -> int:
    """Copies the graph that the engine has run; returns its bytes.

    :raises WorkerError: if the task has no rows to export with, or calls the model in several ways.
    """
    if len(folders) != 1:
        raise WorkerError(
            f"the task runs {len(folders)} graphs of the model on these rows, and a folder holds one; give other rows"
        )
    files = [
        path for path in folders[0].iterdir() if not path.name.endswith("config.json") and path.name != KEY
    ]
    for path in files:
        shutil.copyfile(path, made / path.name)
    return sum(path.stat().st_size for path in files)


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out` when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    made = scratch / "model"
    try:
        made.mkdir()  # with the permissions of any new folder, which mkdtemp does not give
        yield made
        os.rename(made, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy_others(folder: Path, made: Path) -> None:
    """Copies what the model has besides weights and what is there: config, tokenizer, processor, pooling with its layers."""
    present = OLD_TOKENIZER if (made / "tokenizer_config.json").exists() else ()
    for name in files_in(folder):
        path, target = Path(name), made / name
        hidden = any(part.startswith(".") for part in path.parts)
        weights = any(path.match(pattern) for pattern in WEIGHTS) and not DENSE.fullmatch(name)
        if hidden or weights or target.exists() or name in ("README.md", KEY, *present):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)


def _card(spec: JobSpec, model: Model, verdict: Verdict | None, out: Path) -> str:
    """Returns the model card. Of a model that is not on the Hub it names the folder alone, not where that is."""
    name = model.name if model.hub else Path(model.source or model.folder).name
    lines, engine = [], spec.engine
    if verdict and verdict.measures:
        lines = ["| measure | value | limit |", "|---|---:|---|"]
        lines += [
            f"| {key} | {value:.5g} | {verdict.limits.get(key, '')} |"
            for key, value in verdict.measures.items()
        ]
    kind = "" if engine.quantization == "none" else engine.quantization
    graph = engine.name if ENGINES[engine.name].exports else ""
    made = f"quantised to {kind} by hfbatch {__version__}" if kind else f"exported by hfbatch {__version__}"
    command = ["hfbatch", "predict", spec.task, "INPUT", "OUTPUT", "--model", out.name]
    command += ["--set", f"engine={graph}"] if graph else []
    command += ["--set", f"model.dtype={spec.model.dtype}"] if graph and spec.model.dtype != "float32" else []
    data = yaml.safe_dump(
        {"base_model": name, "tags": [word for word in (graph, kind) if word]}, sort_keys=False
    )
    agrees = "The graph agrees with the model in float32 within a thousandth of the largest value"
    return CARD.format(
        data=data,
        title=as_markdown(Path(name).name),
        form=" ".join(filter(None, [f"for {graph}" if graph else "", f"in {kind}" if kind else ""])),
        source=f"{f'A graph for {graph} of' if graph else 'The weights of'} {as_markdown(name)} at `{model.commit}`, {made}.",
        task=spec.task,
        summary=verdict.summary
        if verdict
        else agrees
        if graph and not kind
        else "It was not compared with float32",
        table="\n".join([*lines, ""]),
        command=fenced(shlex.join(command), "bash"),
    )
