"""Embedding: measures hfbatch against what a user would pick instead, on the same texts, in the same run, in turn.

Rows per second of all-MiniLM-L6-v2 from Parquet to Parquet, without start-up (from the first batch to the end) and
with it (the whole command), as medians of a few rounds; the ratio of hfbatch to each, and whether it reaches its
target. The bare engine loop is the ceiling: the same batches in one process. Vectors are compared too.

    python -m tests.benchmarks.embed --daft-python /path/to/venv-with-daft/bin/python
    python -m tests.benchmarks.embed --source ag_news.parquet --rows 7600 --rounds 3 --json embed.json
    python -m tests.benchmarks.embed --only hfbatch sbert --rows 1000 --rounds 1
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from tests.benchmarks import tools
from tests.benchmarks.corpus import write_corpus

HFBATCH = {
    "hfbatch": (),
    "hfbatch-fp32": ("model.dtype=float32",),
    "hfbatch-int8": ("engine={name: openvino, quantization: int8}", "model.dtype=float32"),
    "hfbatch-auto": ("engine=auto",),
}
PEERS = ("sbert", "sbert-bf16", "ray-recipe", "daft")
BARE = "bare"
NAMES = (*HFBATCH, BARE, *PEERS)
TARGETS = (
    ("hfbatch", "sbert", 3.5),
    ("hfbatch", "sbert-bf16", 1.2),
    ("hfbatch", "daft", 4.0),
    ("hfbatch", "ray-recipe", 8.0),
    ("hfbatch-fp32", "sbert", 1.3),
    ("hfbatch", "bare loop", 0.93),
    ("hfbatch", "bare tokenise + loop", 0.93),
)
"""Who, against whom, and the least ratio of their rates."""
MOST_PADDING = 0.05
DEFAULT_BATCH = 32
"""Of the bare loop, where no job has chosen one."""


@dataclass(frozen=True)
class Measure:
    """One run of one contestant."""

    rate: float
    """Rows per second without start-up."""
    rate_in_all: float | None
    """Rows per second of the whole command; None where there is no command that a user would run."""
    details: dict[str, Any]


class Contest:
    """Runs contestants over one corpus and keeps their measures by name, as well as a sample of their vectors."""

    def __init__(self, source: Path, folder: Path, rows: int, daft_python: str | None) -> None:
        self.source, self.folder, self.rows, self.daft_python = source, folder, rows, daft_python
        self.measures: dict[str, list[Measure]] = defaultdict(list)
        self.vectors: dict[str, np.ndarray] = {}
        self._batch = DEFAULT_BATCH

    def run(self, name: str) -> None:
        """One run of a contestant, into a new folder that is removed afterwards."""
        out = self.folder / f"out-{name}"
        if name == BARE:
            self._run_bare()
        elif name in HFBATCH:
            self.measures[name].append(self._run_hfbatch(name, out))
        else:
            self.measures[name].append(self._run_peer(name, out))
        if out.exists():
            self.vectors.setdefault(name, read_vectors(out))
        for left in self.folder.glob(f"{out.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _run_hfbatch(self, name: str, out: Path) -> Measure:
        done = tools.run(tools.embed_command(self.source, out, tools.minilm(), *HFBATCH[name]))
        report = done.answer
        self._check_rows(name, report["rows"]["out"])
        if name == "hfbatch":
            self._batch = report["batch_size"]
        reported = {key: report[key] for key in ("seconds", "batch_size", "dtype", "padding", "stages")}
        return Measure(report["rates"]["rows_per_s"], self.rows / done.seconds, reported)

    def _run_peer(self, name: str, out: Path) -> Measure:
        python = self.daft_python if name == "daft" else sys.executable
        done = tools.run(
            [python or sys.executable, Path(__file__).with_name("peers.py"), name, self.source, out]
        )
        reported = done.answer
        self._check_rows(name, reported["rows"])
        return Measure(
            self.rows / reported["job_s"], self.rows / (done.seconds - reported["aside_s"]), reported
        )

    def _run_bare(self) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.bare", self.source, "--batch", str(self._batch)]
        reported = tools.run(command).answer
        self._check_rows(BARE, reported["rows"])
        both = reported["device_s"] + reported["tokenise_s"]
        self.measures["bare loop"].append(Measure(self.rows / reported["device_s"], None, reported))
        self.measures["bare tokenise + loop"].append(Measure(self.rows / both, None, reported))

    def _check_rows(self, name: str, rows: int) -> None:
        if rows != self.rows:
            sys.exit(f"{name} wrote {rows:,} rows of {self.rows:,}")

    def rates(self, name: str) -> tuple[float | None, float | None]:
        """Medians of a contestant's rates, without and with start-up; None where there is none."""
        found = self.measures.get(name, [])
        in_all = [one.rate_in_all for one in found if one.rate_in_all is not None]
        return median(one.rate for one in found) if found else None, median(in_all) if in_all else None


def read_vectors(out: Path) -> np.ndarray:
    """Embeddings in order of `id`, each of length 1: float32 [rows, dimension]."""
    files = [str(path) for path in out.glob("*.parquet")]
    table = ds.dataset(files, format="parquet").to_table(columns=["id", "embedding"]).sort_by("id")
    column = table["embedding"].combine_chunks()
    values = np.asarray(column.flatten(), np.float32).reshape(len(table), -1)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def compare(contest: Contest) -> list[dict[str, Any]]:
    """Each target beside what was measured, for those that ran."""
    rows = []
    for who, whom, target in TARGETS:
        ours, theirs = contest.rates(who), contest.rates(whom)
        ratios = [mine / other if mine and other else None for mine, other in zip(ours, theirs, strict=True)]
        if ratios[0] is not None:
            met = [None if ratio is None else ratio >= target for ratio in ratios]
            rows.append({"who": who, "whom": whom, "target": target, "ratios": ratios, "met": met})
    return rows


def show(contest: Contest, compared: list[dict[str, Any]]) -> None:
    """Prints rates, ratios, padding and how close the vectors are."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.1f}"

    rates = [
        [name, *map(number, contest.rates(name)), ", ".join(f"{one.rate:,.0f}" for one in runs)]
        for name, runs in contest.measures.items()
    ]
    columns = ("", "rows/s without start-up", "rows/s with start-up", "each round, without")
    tools.show(f"{contest.rows:,} rows, medians", columns, rates)
    columns = ("", "target", "without start-up", "", "with start-up", "")
    ratios = [
        [f"{one['who']} / {one['whom']}", f"≥ {one['target']:g}"]
        + [cell for ratio, met in zip(one["ratios"], one["met"], strict=True) for cell in (_times(ratio), tools.verdict(met))]
        for one in compared
    ]  # fmt: skip
    tools.show("hfbatch against", columns, ratios)
    for name in HFBATCH:
        if name in contest.measures:
            padding = contest.measures[name][0].details["padding"]
            print(f"{name}: padding {padding:.1%} of tokens, target at most {MOST_PADDING:.0%}")
    for name, cosine in cosines(contest).items():
        print(f"{name}: cosine to sbert mean {cosine[0]:.6f}, least {cosine[1]:.6f}")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def cosines(contest: Contest) -> dict[str, tuple[float, float]]:
    """Mean and least cosine of each contestant's vectors to those of sentence-transformers in float32."""
    if "sbert" not in contest.vectors:
        return {}
    truth = contest.vectors["sbert"]
    found = {name: (vectors * truth).sum(1) for name, vectors in contest.vectors.items() if name != "sbert"}
    return {name: (float(cosine.mean()), float(cosine.min())) for name, cosine in found.items()}


def chosen_names(only: list[str] | None, daft_python: str | None) -> list[str]:
    """Who takes part, in order."""
    names = [name for name in NAMES if not only or name in only]
    if "daft" in names and daft_python is None:
        print("daft is left out: give --daft-python, a Python that has it", file=sys.stderr)
        names.remove("daft")
    return names


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--rows", type=int, default=7600)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--source", type=Path, help="a Parquet file with a text column; default: generated")
    options.add_argument("--daft-python", help="a Python with daft[huggingface] and sentence-transformers")
    options.add_argument("--only", nargs="+", choices=NAMES, help="leave out the others")
    return options.parse_args()


def main() -> None:
    options = parse()
    names = chosen_names(options.only, options.daft_python)
    with tools.workspace() as folder:
        source = write_corpus(folder / "texts", options.rows, source=options.source)
        contest = Contest(source, folder, options.rows, options.daft_python)
        for number in range(1, options.rounds + 1):
            for name in names:
                busy = f"load {os.getloadavg()[0]:.1f}"
                print(f"round {number} of {options.rounds}: {name} ({busy})", file=sys.stderr, flush=True)
                contest.run(name)
    compared = compare(contest)
    show(contest, compared)
    measures = {name: [asdict(one) for one in runs] for name, runs in contest.measures.items()}
    figures = {"rows": options.rows, "measures": measures, "targets": compared, "cosines": cosines(contest)}
    tools.save(options.json, figures)


if __name__ == "__main__":
    main()
