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
from hfbatch.data.formats.columns import arrays_of
from hfbatch.data.media_files import with_absolute_paths
from hfbatch.errors import SpecError
from hfbatch.output.rejects import unreadable
from hfbatch.predict.bind import bind
from hfbatch.predict.preview import first_rows
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import Verdict
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec

ROWS = 512
"""Rows of the input, of which the comparison takes some."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".onnx", ".h5", ".msgpack")
"""Endings of the files that are not copied from the model."""
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
    faults = [f"{out} exists; choose another folder"] if out.exists() else []
    if spec.engine.quantization == "none":
        faults.append("engine.quantization none names no quantisation; give one, such as int8")
    bound = bind(spec.model_copy(update={"input": with_absolute_paths(spec.input)}), None, faults)
    if faults or bound is None:
        raise SpecError(list(dict.fromkeys(faults)))
    rows = first_rows(bound, ROWS)
    columns = arrays_of(rows.table, bound.inputs)
    runner = Runner(RunnerConfig.of(bound.spec, bound.model, bound.source.root_url))
    runner.load()
    features = runner.preprocess(columns, rows.places, unreadable(rows)).features
    verdict = runner.guard(features, len(rows.table), columns)
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
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy_others(folder: Path, made: Path) -> None:
    """Copies what the model has besides config and weights: tokenizer, processor, pooling."""
    for path in folder.iterdir():
        target = made / path.name
        if target.exists() or path.name.endswith(WEIGHTS) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(
                path, target, ignore=shutil.ignore_patterns(*(f"*{ending}" for ending in WEIGHTS))
            )
        elif path.name not in ("README.md", "hfbatch_export.json"):
            shutil.copyfile(path, target)


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
