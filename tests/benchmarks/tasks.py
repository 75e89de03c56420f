"""Text tasks: measures hfbatch against the pipeline of transformers with batches of 8, on the same rows and threads.

Rows per second from Parquet, at the same precision, without start-up and with it (the whole command), their ratios, and the
share of rows whose answers are the same, floats within 1e-4. Models have the size of all-MiniLM-L6-v2 (6 layers of
384) or of a small T5, with random weights, and its tokenizer; texts are generated, of many lengths.

    python -m tests.benchmarks.tasks --rows 600 --rounds 3
    python -m tests.benchmarks.tasks --only question-answering --source ag_news.parquet --json tasks.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tests.benchmarks import pipelines, tools
from tests.benchmarks.corpus import write_corpus

HEADS = {
    "question-answering": "BertForQuestionAnswering",
    "token-classification": "BertForTokenClassification",
    "zero-shot-classification": "BertForSequenceClassification",
    "summarization": "T5ForConditionalGeneration",
}
PARAMS: dict[str, dict[str, Any]] = {
    "question-answering": {
        "max_seq_len": pipelines.MOST_TOKENS,
        "doc_stride": pipelines.STRIDE,
        "max_answer_len": pipelines.LONGEST_ANSWER,
    },
    "token-classification": {"aggregation_strategy": pipelines.STRATEGY},
    "zero-shot-classification": {"candidate_labels": pipelines.LABELS},
    "summarization": {"max_new_tokens": pipelines.NEW_TOKENS},
}
LABELS = {
    "token-classification": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "zero-shot-classification": ["contradiction", "neutral", "entailment"],
}
TARGET = 1.5
TOLERANCE = 1e-4
MOST_TEXTS = 12
"""Of a context, which is made of the texts that follow."""


@dataclass(frozen=True)
class Round:
    """One run of both on one task; rows per second."""

    ours: float
    ours_in_all: float
    theirs: float
    theirs_in_all: float
    same: float
    """Share of rows whose answers are the same."""
    details: dict[str, Any]
    """Of hfbatch's report."""

    @property
    def ratios(self) -> tuple[float, float]:
        """Without start-up and with it."""
        return self.ours / self.theirs, self.ours_in_all / self.theirs_in_all


def build_model(task: str, folder: Path) -> Path:
    """A model for a task, with the tokenizer of all-MiniLM-L6-v2. :returns: its folder."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tools.minilm())
    tokenizer.model_max_length = 512
    torch.manual_seed(0)
    names = dict(enumerate(LABELS.get(task, ())))
    labels = {"id2label": names, "label2id": {name: place for place, name in names.items()}} if names else {}
    if task == "summarization":
        config = transformers.T5Config(
            d_model=256, d_kv=32, d_ff=1024, num_layers=4, num_heads=8, vocab_size=len(tokenizer),
            pad_token_id=0, eos_token_id=tokenizer.sep_token_id, decoder_start_token_id=0,
        )  # fmt: skip
    else:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            vocab_size=len(tokenizer), initializer_range=0.08, **labels,
        )  # fmt: skip
    model = getattr(transformers, HEADS[task])(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows: int, source: Path | None) -> Path:
    """`id`, `text`, and `question` with `context`, which is one text to MOST_TEXTS of them. :returns: the folder."""
    texts = ds.dataset(write_corpus(folder / "texts", rows, source=source)).to_table().sort_by("id")["text"]
    whole = texts.to_pylist()
    columns = {
        "id": range(rows),
        "text": whole,
        "question": [f"who {' '.join(text.split()[:6])}?" for text in whole],
        "context": [" ".join(whole[k : k + 1 + k * 7 % MOST_TEXTS]) for k in range(rows)],
    }
    (folder / "rows").mkdir()
    pq.write_table(pa.table(columns), folder / "rows" / "rows.parquet", row_group_size=200)
    return folder / "rows"


def measure(task: str, model: Path, source: Path, rows: int, dtype: str, folder: Path) -> Round:
    """Both in turn, each in a process of its own."""
    out, answers, spec = folder / "out", folder / "answers.json", folder / "spec.yaml"
    settings = {
        "task": task,
        "model": {"name": str(model), "dtype": dtype},
        "input": str(source),
        "output": {"path": str(out), "keep": ["id"]},
        "params": PARAMS[task],
    }
    spec.write_text(json.dumps(settings), encoding="utf8")  # JSON is YAML
    ours = tools.run([*tools.HFBATCH, "run", spec, *tools.OPTIONS])
    theirs = tools.run(
        [sys.executable, "-m", "tests.benchmarks.pipelines", task, model, source, dtype, answers]
    )
    found = ds.dataset(sorted(map(str, out.glob("*.parquet")))).to_table().sort_by("id").drop_columns(["id"])
    pairs = zip(found.to_pylist(), json.loads(answers.read_text(encoding="utf8")), strict=True)
    same = sum(alike(got, expected) for got, expected in pairs) / rows
    shutil.rmtree(out)
    reported = {key: ours.answer[key] for key in ("seconds", "batch_size", "padding", "stages")}
    return Round(
        ours.answer["rates"]["rows_per_s"], rows / ours.seconds, rows / theirs.answer["job_s"],
        rows / theirs.seconds, same, reported,
    )  # fmt: skip


def alike(got: Any, expected: Any) -> bool:
    """Equal, floats within TOLERANCE."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(alike(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(alike, got, expected))
    return abs(got - expected) < TOLERANCE if isinstance(expected, float) else got == expected


def show(rows: int, rounds: dict[str, list[Round]]) -> None:
    """Prints medians, ratios and how many answers are the same."""
    columns = (
        "",
        "hfbatch",
        "pipeline",
        "ratio",
        f"≥ {TARGET:g}",
        "hfbatch",
        "pipeline",
        "ratio",
        "same answers",
    )
    lines = []
    for task, runs in rounds.items():
        cells = [
            median(getattr(one, name) for one in runs)
            for name in ("ours", "theirs", "ours_in_all", "theirs_in_all")
        ]
        ratios = [median(one.ratios[k] for one in runs) for k in (0, 1)]
        lines.append(
            [task, f"{cells[0]:,.1f}", f"{cells[1]:,.1f}", f"{ratios[0]:.2f}", tools.verdict(ratios[0] >= TARGET),
             f"{cells[2]:,.1f}", f"{cells[3]:,.1f}", f"{ratios[1]:.2f}", f"{min(one.same for one in runs):.1%}"]
        )  # fmt: skip
    tools.show(f"{rows:,} rows, rows/s: without start-up, then with it", columns, lines)


def parse() -> argparse.Namespace:
    options = tools.arguments(__doc__)
    options.add_argument("--rows", type=int, default=600)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--source", type=Path, help="a Parquet file with a text column; default: generated")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--only", nargs="+", choices=HEADS, help="leave out the others")
    return options.parse_args()


def main() -> None:
    options = parse()
    rounds: dict[str, list[Round]] = {}
    with tools.workspace() as folder:
        source = write_rows(folder, options.rows, options.source)
        for task in options.only or HEADS:
            model = build_model(task, folder / task)
            rounds[task] = []
            for number in range(1, options.rounds + 1):
                busy = f"load {os.getloadavg()[0]:.1f}"
                print(f"{task}: round {number} of {options.rounds} ({busy})", file=sys.stderr, flush=True)
                rounds[task].append(measure(task, model, source, options.rows, options.dtype, folder))
    print(options.dtype)
    show(options.rows, rounds)
    tools.save(options.json, {task: [asdict(one) for one in runs] for task, runs in rounds.items()})


if __name__ == "__main__":
    main()
