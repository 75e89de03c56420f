"""Fine-tuning: measures hfbatch against transformers' Trainer in one process, and two workers against one.

Rows per second of the training steps, without start-up and evaluation, at the same precision, batch and most tokens.

    python -m tests.benchmarks.training --source sst2_train.parquet --rounds 3
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import plain_trainer, tools
from tests.benchmarks.corpus import write_corpus

TEAMS = {"one worker": (1, 2), "two workers": (2, 1)}
"""Workers, and the CPUs of each."""
TARGETS = {"one worker": 1.0, "two workers": 0.9}
"""Of the Trainer's speed, and of one worker's."""


def write_rows(folder: Path, rows: int, source: Path | None) -> Path:
    """`text` and a whole number as `label`. :returns: a Parquet file."""
    if source is None:
        write_corpus(folder / "corpus", rows)
        texts = pq.read_table(folder / "corpus")["text"].to_pylist()[:rows]
        table = pa.table({"text": texts, "label": [len(text.split()) % 2 for text in texts]})
    else:
        table = pq.read_table(source, columns=["text", "label"])[:rows]
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def ours(folder: Path, rows: Path, team: tuple[int, int], options: argparse.Namespace) -> float:
    """Rows per second of hfbatch."""
    workers, cpus = team
    sets = {
        "workers.count": workers, "workers.cpus": cpus, "schedule.epochs": options.epochs, "batch.size": options.batch,
        "batch.max_length": plain_trainer.MOST_TOKENS, "compute.dtype": options.dtype, "evaluation.fraction": 0.01,
    }  # fmt: skip
    flags = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    out = folder / "out"
    command = [*tools.HFBATCH, "finetune", "text-classification", rows, out, "--model", tools.minilm()]
    ended = tools.run([*command, *tools.OPTIONS, *flags])
    shutil.rmtree(out)
    return ended.answer["throughput"]["rows_per_s"]


def theirs(folder: Path, rows: Path, options: argparse.Namespace) -> float:
    """Rows per second of transformers' Trainer."""
    command = [sys.executable, "-m", "tests.benchmarks.plain_trainer", tools.minilm(), rows, options.dtype]
    ended = tools.run([*command, str(options.batch), str(options.epochs), folder / "plain"])
    return ended.answer["rows"] / ended.answer["train_s"]


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--rows", type=int, default=4000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--source", type=Path, help="a Parquet file with text and label; default: generated")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return options.parse_args()


def main() -> None:
    options = parse()
    found: dict[str, list[float]] = {"Trainer": [], **{name: [] for name in TEAMS}}
    with tools.workspace() as folder:
        rows = write_rows(folder, options.rows, options.source)
        for _ in range(options.rounds):
            found["Trainer"].append(theirs(folder, rows, options))
            for name, team in TEAMS.items():
                found[name].append(ours(folder, rows, team, options))
    speed = {name: median(rates) for name, rates in found.items()}
    ratios = {
        "one worker": speed["one worker"] / speed["Trainer"],
        "two workers": speed["two workers"] / speed["one worker"],
    }
    lines = [["Trainer", f"{speed['Trainer']:,.1f}", "", ""]]
    lines += [
        [
            name,
            f"{speed[name]:,.1f}",
            f"{ratios[name]:.2f} × (≥ {target:g})",
            tools.verdict(ratios[name] >= target),
        ]
        for name, target in TARGETS.items()
    ]
    tools.show(
        f"{options.rows:,} rows, {options.dtype}: rows/s", ("", "rows/s", "of the line above", ""), lines
    )
    tools.save(options.json, found)


if __name__ == "__main__":
    main()
