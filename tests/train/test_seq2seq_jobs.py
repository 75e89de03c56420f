"""Encoder-decoder models: what the evaluation measured is what the exported model then writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.metrics.generation import bleu, chrf, rouge
from hfbatch.train.run import FinetuneResult, finetune
from tests.models.text import CORPUS, tiny_bart, tiny_mbart
from tests.train.tools import finetune_here, predicted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences in `body`, and in `short` their first two words; 11 to measure with, which two workers do not halve."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    order = random.permutation(len(CORPUS)).tolist()
    for part, rows in (("train", order[11:]), ("dev", order[:11])):
        texts = [CORPUS[row] for row in rows]
        table = pa.table(
            {"body": texts, "short": [f"so {' '.join(text.split()[:2])} was there" for text in texts]}
        )
        (folder / part).mkdir()
        pq.write_table(table, folder / part / "rows.parquet", row_group_size=30)
    return folder


def spec_of(task: str, model: str, data: Path, out: Path, workers: int, **params: Any) -> FinetuneSpec:
    columns = {"text": "body", "target": "short"}
    return FinetuneSpec.build(
        {
            "task": task,
            "model": model,
            "train": {"path": str(data / "train"), "columns": columns},
            "eval": {"path": str(data / "dev"), "columns": columns},
            "output": str(out),
            "evaluation": {"every": 24},
            "schedule": {"epochs": 6, "learning_rate": 1e-2},
            "batch": {"size": 8},
            "compute": {"dtype": "float32"},
            "workers": {"count": workers, "cpus": 1},
            "params": params,
        }
    )


def written(task: str, result: FinetuneResult, data: Path, out: Path) -> pa.Table:
    """What the exported model writes for the rows that it was measured with, beside what it should."""
    return predicted(task, result.model, data / "dev", out, {"text": "body"}, ["short"])


def test_summaries_from_parquet_to_a_model_that_writes_them(data: Path, tmp_path: Path) -> None:
    model = tiny_bart(tmp_path / "base")
    asked = {"prefix": "shorten: ", "max_new_tokens": 12}
    result = finetune_here(spec_of("summarization", model, data, tmp_path / "out", 1, **asked))
    best = result.metrics["best"]
    assert result.metrics["before"]["rougeL"] < 0.2 < 0.6 < best["rougeL"]
    assert 0 < result.metrics["baseline"]["rougeL"] < best["rougeL"]
    assert best["perplexity"] == pytest.approx(np.exp(best["loss"]))
    found = written("summarization", result, data, tmp_path / "found")
    assert rouge(found["summary_text"].to_pylist(), found["short"].to_pylist()) == {
        name: pytest.approx(best[name]) for name in ("rouge1", "rouge2", "rougeL")
    }
    config = json.loads((Path(result.model) / "config.json").read_text())
    assert config["task_specific_params"] == {"summarization": asked}
    assert json.loads((Path(result.model) / "generation_config.json").read_text())["max_new_tokens"] == 12


def test_translations_by_two_workers_into_the_language_that_the_task_names(
    data: Path, tmp_path: Path
) -> None:
    model = tiny_mbart(tmp_path / "base")
    spec = spec_of("translation_en_XX_to_de_DE", model, data, tmp_path / "out", 2, max_new_tokens=30)
    result = finetune_here(spec)
    best = result.metrics["best"]
    assert result.metrics["before"]["chrf"] < 20 < 50 < best["chrf"]
    assert result.metrics["data"]["rows"]["eval"]["rows"] == 11
    found = written("translation_en_XX_to_de_DE", result, data, tmp_path / "found")
    texts, targets = found["translation_text"].to_pylist(), found["short"].to_pylist()
    assert {**bleu(texts, targets), **chrf(texts, targets)} == {
        name: pytest.approx(best[name]) for name in ("bleu", "chrf")
    }
    german = AutoTokenizer.from_pretrained(result.model).convert_tokens_to_ids("de_DE")
    generation = json.loads((Path(result.model) / "generation_config.json").read_text())
    assert generation["forced_bos_token_id"] == german


def test_a_model_of_many_languages_is_refused_without_them(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        finetune(spec_of("translation", tiny_mbart(tmp_path / "base"), data, tmp_path / "out", 1), quiet=True)
    assert [fault.split(" is missing")[0] for fault in caught.value.faults] == [
        "params.src_lang",
        "params.tgt_lang",
    ]
