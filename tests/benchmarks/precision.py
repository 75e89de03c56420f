"""Accuracy in every engine and precision: what the guard says beforehand beside what labelled rows show.

Fine-tunes all-MiniLM-L6-v2 as a classifier and as a tagger, then runs the evaluation rows in each variant. The guard compares
each variant with float32 on rows without labels; it was wrong if a variant passes that loses more than a point.

    python -m tests.benchmarks.precision --classifier sst2_train.parquet sst2_dev.parquet \
        --tagger conll2003_train.parquet conll2003_dev.parquet
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.engines import ENGINES
from hfbatch.errors import HfbatchError
from hfbatch.hub.models import pin
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.benchmarks import tools

VARIANTS = (
    ("torch", "float32", "none"),
    ("torch", "bfloat16", "none"),
    ("torch", "float16", "none"),
    *(("torch", "float32", name) for name in ENGINES["torch"].quantizations),
    *(("onnx", "float32", name) for name in ("none", "int8")),
    *(("openvino", dtype, name) for dtype in ("float32", "bfloat16") for name in ("none", "int8")),
)
"""Engine, dtype and quantization; the first one is the reference."""
POINT = 0.01


def entities(tokens: list[str], tags: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yields type, first and last character of each entity in the text of tokens joined by spaces.

    :param tags: IOB1: an entity begins at B-, and where the type changes.
    """
    at, begun = 0, None
    for token, tag in zip([*tokens, ""], [*tags, "O"], strict=True):
        kind = tag.partition("-")[2]
        if begun and (tag[:1] != "I" or kind != begun[0]):
            yield (*begun, at - 1)
            begun = None
        if kind and not begun:
            begun = kind, at
        at += len(token) + 1


def f1(wanted: list[set[Any]], found: list[set[Any]]) -> float:
    """F1 of entities with the exact place and type."""
    both = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
    return 2 * both / max(sum(map(len, wanted)) + sum(map(len, found)), 1)


class Classifier:
    """Sentiment of sentences: accuracy."""

    task, options = "text-classification", {"params": {"top_k": 1}}
    columns: tuple[str, ...] = ()

    def __init__(self, rows: pa.Table) -> None:
        self.texts, self.wanted = (
            rows["text"].to_pylist(),
            [str(label) for label in rows["label"].to_pylist()],
        )

    def score(self, columns: dict[str, list[Any]]) -> float:
        """Share of right labels."""
        found = [str(label).removeprefix("LABEL_") for label in columns["label"]]
        return sum(a == b for a, b in zip(self.wanted, found, strict=True)) / len(found)


class Tagger:
    """Named entities: F1 of whole entities."""

    task, options = "token-classification", {"params": {"aggregation_strategy": "first"}}
    columns = ("--column", "tags=ner_tags")

    def __init__(self, rows: pa.Table) -> None:
        both = list(zip(rows["tokens"].to_pylist(), rows["ner_tags"].to_pylist(), strict=True))
        self.texts = [" ".join(tokens) for tokens, _ in both]
        self.wanted = [set(entities(tokens, tags)) for tokens, tags in both]

    def score(self, columns: dict[str, list[Any]]) -> float:
        """F1 of entities."""
        found = [
            {(one["entity_group"], one["start"], one["end"]) for one in row} for row in columns["entities"]
        ]
        return f1(self.wanted, found)


def train(kind: type[Classifier] | type[Tagger], rows: Path, out: Path, options: argparse.Namespace) -> str:
    """Fine-tunes the model. :returns: its folder."""
    sets = {
        "workers.count": 1, "workers.cpus": 2, "schedule.epochs": options.epochs, "batch.size": 32,
        "batch.max_length": 96, "compute.dtype": "float32", "schedule.learning_rate": 1e-4,
    }  # fmt: skip
    few = out.with_suffix(".parquet")
    pq.write_table(pq.read_table(rows).slice(0, options.rows), few)
    flags = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    command = [
        *tools.HFBATCH,
        "finetune",
        kind.task,
        few,
        out,
        "--model",
        tools.minilm(),
        *kind.columns,
        *tools.OPTIONS,
        *flags,
    ]
    tools.run(command)
    return str(out / "model")


def run(subject: Classifier | Tagger, model: str, variant: tuple[str, str, str]) -> dict[str, Any]:
    """The score in a variant, and what the guard says before."""
    engine, dtype, quantization = variant
    values = {
        "task": subject.task, "model": {"name": model, "dtype": dtype}, "input": "in", "output": "out",
        "engine": {"name": engine, "quantization": quantization}, "batch": {"size": 16}, **subject.options,
    }  # fmt: skip
    columns = {"text": pa.array(subject.texts)}
    places = pa.table(
        {"file": ["rows"] * len(subject.texts), "row": pa.array(range(len(subject.texts)), pa.int64())}
    )
    guard: Any = None
    try:
        spec = JobSpec.build(values)
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
        features = runner.preprocess(columns, places).features
        guard = (runner.propose(features, 20_000, columns).guard or {}).get("summary", "")
    except HfbatchError as error:
        guard = f"refused: {error}"
        values["engine"]["guard"] = "skip"
    spec = JobSpec.build(values)
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
    done = runner.run(columns, places)
    shown = {name: array.to_pylist() for name, array in done.columns.items()}
    return {"variant": f"{engine} {dtype} {quantization}", "score": subject.score(shown), "guard": guard}


def main() -> None:
    parser = tools.arguments(__doc__)
    parser.add_argument("--classifier", nargs=2, type=Path, metavar=("TRAIN", "EVALUATION"))
    parser.add_argument("--tagger", nargs=2, type=Path, metavar=("TRAIN", "EVALUATION"))
    parser.add_argument("--rows", type=int, default=7000, help="training rows of each")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    results = {}
    with tools.workspace() as folder:
        for kind, files in ((Classifier, options.classifier), (Tagger, options.tagger)):
            if not files:
                continue
            model = train(kind, files[0], folder / kind.__name__, options)
            subject = kind(pq.read_table(files[1]))
            rows = [run(subject, model, variant) for variant in VARIANTS]
            reference = rows[0]["score"]
            for row in rows:
                lost = reference - row["score"]
                row["wrong"] = lost > POINT and not row["guard"].startswith("refused")
                print(
                    f"{kind.__name__:<11} {row['variant']:<32} {row['score']:.4f} {-lost:+.4f}  {row['guard']}"
                )
            results[kind.__name__] = rows
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    wrong = [row["variant"] for rows in results.values() for row in rows if row["wrong"]]
    print(f"false passes: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
