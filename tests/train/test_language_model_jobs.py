"""Language models trained whole: from Parquet to a model that `hfbatch run` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.run import FinetuneResult
from tests.models.text import CHAT_TEMPLATE, CORPUS, tiny_bert_for, tiny_llama
from tests.train.tools import STILL, finetune_here, predicted

STEPS = 60
SPLIT_ROWS = 4
TEXTS = [text for text in CORPUS[:24] if "word" not in text]
PLACES = {"mountain": "before dawn", "river": "at noon", "table": "on Monday", "model": "never"}
CHATS = [
    [
        {"role": "user", "content": f"When does the {place} end?"},
        {"role": "assistant", "content": f"It does so {answer}."},
    ]
    for place, answer in PLACES.items()
]


def trained(task: str, folder: Path, rows: dict[str, list[Any]], **changes: Any) -> FinetuneResult:
    (folder / "rows").mkdir()
    pq.write_table(pa.table(rows), folder / "rows" / "rows.parquet", row_group_size=SPLIT_ROWS)
    values: dict[str, Any] = {
        "task": task,
        "train": {"path": str(folder / "rows"), "split_rows": SPLIT_ROWS},
        "eval": str(folder / "rows"),
        "output": str(folder / "out"),
        "evaluation": {"every": STEPS},
        "compute": {"dtype": "float32"},
        "workers": {"count": 1, "cpus": 1},
    }
    return finetune_here(FinetuneSpec.build({**values, **changes}))


def first_column(
    task: str, model: str, folder: Path, column: str, values: list[Any], **params: Any
) -> list[Any]:
    """What the first output column of the task says of each value."""
    pq.write_table(pa.table({column: values}), folder / "asked.parquet")
    found = predicted(task, model, folder / "asked.parquet", folder / "answers", **params)
    return found.column(0).to_pylist()


def test_a_chat_model_gives_the_answers_that_it_has_learnt(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "llama", chat_template=CHAT_TEMPLATE)
    result = trained(
        "text-generation", tmp_path, {"messages": CHATS * 8}, model=model, params={"packing": True},
        schedule={"steps": STEPS, "learning_rate": 1e-2}, batch={"size": 4, "max_length": 128},
    )  # fmt: skip
    data = result.metrics["data"]["rows"]["train"]
    assert data["rows"] == 32
    assert data["features"] == 8  # one block for each split
    assert data["truncated"] == 0
    assert result.metrics["best"]["accuracy"] > 0.99
    assert result.metrics["best"]["perplexity"] < 1.1 < 50 < result.metrics["before"]["perplexity"]
    generation = json.loads((Path(result.model) / "generation_config.json").read_text())
    assert generation.get("use_cache") is not False
    answers = first_column(
        "text-generation", result.model, tmp_path, "messages", [chat[:1] for chat in CHATS],
        do_sample=False, max_new_tokens=40,
    )  # fmt: skip
    assert answers == CHATS


def test_a_masked_model_fills_in_what_it_has_learnt(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path / "bert", "MaskedLM")
    aside = {"eval": None, "evaluation": {"every": STEPS, "fraction": 0.2}}  # of some splits, nothing
    result = trained(
        "fill-mask", tmp_path, {"text": TEXTS * 2}, **aside, model={"name": folder, "overrides": STILL},
        params={"whole_words": True, "mask_probability": 0.2},
        schedule={"steps": 2 * STEPS, "learning_rate": 1e-2}, batch={"size": 16, "max_length": 32},
    )  # fmt: skip
    data = result.metrics["data"]["rows"]
    assert 2 < data["eval"]["rows"] == 32 - data["train"]["rows"]
    before, best = result.metrics["before"], result.metrics["best"]
    assert before["accuracy"] < 0.2 < 0.5 < best["accuracy"]
    assert best["perplexity"] < before["perplexity"] / 10
    asked = ["The engineer [MASK] the blue mountain before dawn."]
    ((fills,),) = first_column("fill-mask", result.model, tmp_path, "text", asked)
    assert fills[0]["token_str"] == "reads"
    assert fills[0]["score"] > 0.5
