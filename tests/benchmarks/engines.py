"""Engines: compares precisions and engines on the CPU, by rows per second and by how close their vectors are to float32.

Each contestant is a runner with all-MiniLM-L6-v2 in this process, without Ray, on all cores (`taskset -c 0,1` for two).
They predict the same features in turn, round after round; a ratio is the median over rounds of the rate to that of torch in
float32 in the same round. Each has caches of its own of exported models and of compiled code, so that the seconds until it
is ready include the export or the compilation.

    taskset -c 0,1 python -m tests.benchmarks.engines --source ag_news.parquet --rows 1000
    python -m tests.benchmarks.engines --only torch-float32 openvino-int8 --rows 500 --json engines.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from hfbatch.cli.engines import list_exports
from hfbatch.hub.models import pin
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.engines import EngineSpec
from hfbatch.spec.job import BatchSpec, ModelSpec
from tests.benchmarks import tools
from tests.benchmarks.corpus import generate

CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch-float32": ("float32", {"name": "torch"}),
    "torch-compiled": ("float32", {"name": "torch", "compile": True}),
    "torch-bfloat16": ("bfloat16", {"name": "torch"}),
    "torch-bfloat16-compiled": ("bfloat16", {"name": "torch", "compile": True}),
    "torch-int8": ("float32", {"name": "torch", "quantization": "int8"}),
    "torch-nf4": ("float32", {"name": "torch", "quantization": "nf4"}),
    "onnx-float32": ("float32", {"name": "onnx"}),
    "onnx-int8": ("float32", {"name": "onnx", "quantization": "int8"}),
    "openvino-float32": ("float32", {"name": "openvino"}),
    "openvino-bfloat16": ("bfloat16", {"name": "openvino"}),
    "openvino-int8": ("float32", {"name": "openvino", "quantization": "int8"}),
}
"""Dtype and engine's section of the spec by name."""
REFERENCE = "torch-float32"
NEAREST = 10


@dataclass
class Contestant:
    """A runner that is ready, and what was measured of it."""

    runner: Runner
    features: pa.Table
    vectors: np.ndarray
    """Of length 1, float32 [rows, dimension]."""
    ready_s: float
    """Seconds to load, export or compile, and predict once."""
    bytes: int
    """Size of the exported graph, or of the model's weights if there is none."""
    seconds: list[float] = field(default_factory=list)
    """Of each round."""

    def run(self) -> None:
        """Predicts all rows once."""
        begun = time.perf_counter()
        self.runner.predict(self.features)
        self.seconds.append(time.perf_counter() - begun)


def contestant(name: str, texts: pa.Array, batch: int, cache: Path) -> Contestant:
    """Loads a model, exporting or compiling it if its engine does, and predicts all rows once."""
    dtype, engine = CONTESTANTS[name]
    os.environ["HFBATCH_CACHE"], os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache), str(cache / "code")
    section = TypeAdapter(EngineSpec).validate_python(engine)
    model = pin(ModelSpec(name=tools.minilm()))
    runner = Runner(RunnerConfig("embedding", model, {}, dtype, BatchSpec(size=batch), section))
    begun = time.perf_counter()
    made = runner.run({"text": texts})
    ready = time.perf_counter() - begun
    places = pa.table({"file": pa.array([""] * len(texts)), "row": pa.array(range(len(texts)), pa.int64())})
    column = made.columns["embedding"]
    vectors = np.asarray(column.flatten(), np.float32).reshape(len(column), -1)
    sizes = [one["bytes"] for one in list_exports() if one["quantization"] == section.quantization]
    return Contestant(
        runner,
        runner.preprocess({"text": texts}, places).features,
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        ready,
        sizes[0] if sizes else model.size()[1],
    )


def nearest(vectors: np.ndarray) -> list[set[int]]:
    """The rows whose vectors are nearest to that of each row."""
    near = vectors @ vectors.T
    np.fill_diagonal(near, -np.inf)
    return [set(row) for row in np.argpartition(-near, NEAREST, axis=1)[:, :NEAREST].tolist()]


def describe(name: str, found: dict[str, Contestant]) -> dict[str, Any]:
    """The figures of a contestant beside the reference."""
    one, reference = found[name], found[REFERENCE]
    cosine = (one.vectors * reference.vectors).sum(1)
    shared = [len(a & b) for a, b in zip(nearest(one.vectors), nearest(reference.vectors), strict=True)]
    return {
        "name": name,
        "rows_per_s": len(one.vectors) / median(one.seconds),
        "ratio": median(whole / own for whole, own in zip(reference.seconds, one.seconds, strict=True)),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "top10_overlap": sum(shared) / NEAREST / len(shared),
        "bytes": one.bytes,
        "ready_s": one.ready_s,
        "seconds": one.seconds,
    }


def show(rows: int, figures: list[dict[str, Any]]) -> None:
    """Prints the figures."""
    columns = ("", "rows/s", "ratio", "mean cosine", "min cosine", "top-10 overlap", "MB", "ready after s")
    lines = [
        [
            one["name"], f"{one['rows_per_s']:,.0f}", f"{one['ratio']:.2f}", f"{one['cosine_mean']:.5f}",
            f"{one['cosine_min']:.4f}", f"{one['top10_overlap']:.3f}", f"{one['bytes'] / 1e6:,.0f}",
            f"{one['ready_s']:.1f}",
        ]
        for one in figures
    ]  # fmt: skip
    tools.show(f"{rows:,} rows, medians; ratios and cosines to {REFERENCE}", columns, lines)


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--rows", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--batch", type=int, default=32, help="rows of a batch")
    options.add_argument("--source", type=Path, help="a Parquet file with a text column; default: generated")
    options.add_argument("--only", nargs="+", choices=CONTESTANTS, help="leave out the others")
    return options.parse_args()


def main() -> None:
    options = parse()
    if options.source:
        texts = pq.read_table(options.source, columns=["text"])["text"].combine_chunks()[: options.rows]
    else:
        texts = generate(options.rows)
    names = [name for name in CONTESTANTS if name == REFERENCE or not options.only or name in options.only]
    found: dict[str, Contestant] = {}
    with tools.workspace() as folder:
        for name in names:
            print(f"loading {name}", file=sys.stderr, flush=True)
            found[name] = contestant(name, texts, options.batch, folder / name)
        for number in range(1, options.rounds + 1):
            busy = f"load {os.getloadavg()[0]:.1f}"
            print(f"round {number} of {options.rounds} ({busy})", file=sys.stderr, flush=True)
            for one in found.values():
                one.run()
    figures = [describe(name, found) for name in found]
    show(len(texts), figures)
    tools.save(options.json, {"rows": len(texts), "batch": options.batch, "engines": figures})


if __name__ == "__main__":
    main()
