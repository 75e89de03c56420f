"""Language models trained as a user does it: from Parquet to a model that `hfbatch run` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import hfbatch
from hfbatch.finetune import FinetuneResult, finetune
from hfbatch.finetune_spec import FinetuneSpec
from tests.models.text import CHAT_TEMPLATE, CORPUS, tiny_bert_for, tiny_llama

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
    pq.write_table(pa.table(rows), folder / "rows" / "rows.parquet", row_group_size=8)
    values: dict[str, Any] = {
        "task": task,
        "train": str(folder / "rows"),
        "eval": str(folder / "rows"),
        "output": str(folder / "out"),
        "compute": {"dtype": "float32"},
    }
    return finetune(FinetuneSpec.build({**values, **changes}), quiet=True)


def predicted(
    task: str, model: str, folder: Path, column: str, values: list[Any], **params: Any
) -> list[Any]:
    """What the first output column of the task says of each value."""
    (folder / "asked").mkdir()
    pq.write_table(pa.table({column: values}), folder / "asked" / "rows.parquet")
    job = {"task": task, "model": model, "input": str(folder / "asked"), "params": params}
    output = {"path": str(folder / "answers"), "keep": []}
    assert hfbatch.run(hfbatch.JobSpec.build({**job, "output": output}), quiet=True).exit_code == 0
    found = ds.dataset(sorted(map(str, (folder / "answers").glob("*.parquet")))).to_table()
    return found.column(0).to_pylist()


@pytest.mark.parametrize("packing", [False, True])
def test_a_chat_model_gives_the_answers_that_it_has_learnt(
    ray_cluster: str, tmp_path: Path, packing: bool
) -> None:
    model = tiny_llama(tmp_path / "llama", chat_template=CHAT_TEMPLATE)
    result = trained(
        "text-generation", tmp_path, {"messages": CHATS * 8}, model=model,
        params={"packing": packing}, schedule={"epochs": 12, "learning_rate": 1e-2},
        batch={"size": 2 if packing else 8, "max_length": 128}, workers={"count": 1 + packing, "cpus": 1},
    )  # fmt: skip
    figures, data = result.metrics["best"], result.metrics["data"]["rows"]["train"]
    assert figures["perplexity"] < 1.1 < 50 < result.metrics["before"]["perplexity"]
    assert figures["accuracy"] > 0.99
    assert data["rows"] == 32
    assert (data["features"] < 16) == packing
    assert (
        json.loads((Path(result.model) / "generation_config.json").read_text()).get("use_cache") is not False
    )
    answers = predicted(
        "text-generation", result.model, tmp_path, "messages", [chat[:1] for chat in CHATS],
        do_sample=False, max_new_tokens=40,
    )  # fmt: skip
    assert answers == CHATS


def test_a_masked_model_fills_in_what_it_has_learnt(ray_cluster: str, tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path / "bert", "MaskedLM")
    result = trained(
        "fill-mask", tmp_path, {"text": CORPUS[:24]}, model={"name": folder, "overrides": STILL},
        schedule={"epochs": 60, "learning_rate": 5e-3}, batch={"size": 12},
        evaluation={"every": 60}, workers={"count": 2, "cpus": 1},
    )  # fmt: skip
    figures = result.metrics["best"]
    assert figures["accuracy"] > 0.6 > result.metrics["before"]["accuracy"]
    assert figures["perplexity"] < result.metrics["before"]["perplexity"] / 10
    losses = [entry["loss"] for entry in result.metrics["evaluations"]]
    assert len(losses) == 3
    (fills,) = predicted(
        "fill-mask", result.model, tmp_path, "text", ["The engineer reads the blue [MASK] dawn."]
    )
    assert [fill["token_str"] for fill in fills[0][:2]]
