"""Writes a model with quantised weights to a folder, with a card that holds its comparison with float32."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml

from hfbatch._version import __version__
from hfbatch.data.filesystem import is_url
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.engines import ENGINES
from hfbatch.errors import SpecError
from hfbatch.hub.models import PICKLES, files_in
from hfbatch.output.rejects import unreadable
from hfbatch.predict.bind import bind
from hfbatch.predict.preview import first_rows
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import Verdict
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec

ROWS = 512
"""Rows of the input, of which the comparison takes some."""
WEIGHTS = (*PICKLES, "*.safetensors", "*.index.json", "*.onnx_data")
"""Files that are not copied from the model."""
CARD = """---
{data}---

# {title} in {quantization}

The weights of `{name}` at `{commit}`, quantised to {quantization} by hfbatch {version}. Task of the comparison: {task}.

{summary}.

{table}
## How to use it

```bash
hfbatch predict {task} INPUT OUTPUT --model {out}
```
"""


@dataclass
class Quantized:
    """A folder with a quantised model."""

    out: str
    quantization: str
    bytes_before: int
    """Bytes of the weights of the model."""
    bytes: int
    guard: dict[str, Any] | None
    """The comparison with float32, see `Verdict`."""


def quantize(spec: JobSpec) -> Quantized:
    """Quantises the model as `spec.engine.quantization` says, compares it with float32 on rows of the input, and saves it.

    :param spec: of a job; its output is the folder to write, which must not exist.
    :raises SpecError: with every fault of the spec.
    :raises WorkerError: if the results differ too much from those in float32; nothing is written then.
    """
    out = Path(spec.output.path)
    faults = [f"{out} exists; choose another folder"] if os.path.lexists(out) else []
    if is_url(spec.output.path):
        faults.append(f"{spec.output.path} is a URL; give a folder of this machine")
    if ENGINES[spec.engine.name].exports:
        faults.append(f"engine {spec.engine.name} quantises a graph of its own; leave engine.name out")
    if spec.engine.quantization == "none":
        faults.append("engine.quantization none names no quantisation; give one, such as int8")
    bound = bind(spec.model_copy(update={"input": with_absolute_paths(spec.input)}), None, faults)
    if faults or bound is None:
        raise SpecError(list(dict.fromkeys(faults)))
    rows = first_rows(bound, ROWS)
    columns = arrays_of(rows.table, bound.inputs)
    runner = Runner(RunnerConfig.of(bound.spec, bound.model, bound.source.root_url))
    runner.load()
    prepared = runner.preprocess(columns, rows.places, unreadable(rows))
    if runner.guarded and not len(prepared.features):
        first = prepared.rejects[0].message
        raise SpecError(f"none of the first {len(rows.table)} rows can be compared: {first}; give other rows")
    verdict = runner.guard(prepared.features, len(rows.table), columns)
    runner.load()  # anew: a call of the model can change how its weights are kept
    name, size = bound.model.name, runner.task.model.size()[1]
    with _made(out) as made:
        runner.engine.model.save_pretrained(made)  # type: ignore[union-attr]
        _copy_others(Path(runner.task.model.folder), made)
        card = _card(bound.spec, name, bound.model.commit, verdict, out)
        (made / "README.md").write_text(card, encoding="utf8")
        stored = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    quantization = bound.spec.engine.quantization
    return Quantized(str(out), quantization, size, stored, asdict(verdict) if verdict else None)


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
    """Copies what the model has besides config and weights: tokenizer, processor, pooling."""
    for name in files_in(folder):
        path, target = Path(name), made / name
        hidden = any(part.startswith(".") for part in path.parts)
        if hidden or target.exists() or any(path.match(pattern) for pattern in WEIGHTS):
            continue
        if name not in ("README.md", "hfbatch_export.json"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)


def _card(spec: JobSpec, name: str, commit: str, verdict: Verdict | None, out: Path) -> str:
    lines = []
    if verdict and verdict.measures:
        lines = ["| measure | value | limit |", "|---|---:|---|"]
        lines += [
            f"| {key} | {value:.5g} | {verdict.limits.get(key, '')} |"
            for key, value in verdict.measures.items()
        ]
    data = yaml.safe_dump({"base_model": str(name), "tags": [spec.engine.quantization]}, sort_keys=False)
    return CARD.format(
        data=data,
        name=name,
        title=Path(name).name,
        commit=commit,
        quantization=spec.engine.quantization,
        version=__version__,
        task=spec.task,
        summary=verdict.summary if verdict else "It was not compared with float32",
        table="\n".join([*lines, ""]),
        out=out.name,
    )
