"""From rows to adapters, and to a model that has them merged and predicts; with two workers too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.run import compare
from tests.models import text
from tests.train.tools import finetune_here, predicted


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with `label` yes where they begin with a word that no tokenizer knows."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 96), ("dev", 33)):
        label = random.integers(0, 2, count)
        lines = [text.CORPUS[place] for place in random.integers(0, len(text.CORPUS), count)]
        rows = {
            "text": [f"{'<yes>' if one else '<no>'} {line}" for one, line in zip(label, lines, strict=True)],
            "label": ["yes" if one else "no" for one in label],
        }
        (folder / part).mkdir()
        pq.write_table(pa.table(rows), folder / part / "rows.parquet")
    return folder


@pytest.mark.parametrize(
    ("method", "rate", "epochs", "workers"),
    [("lora", 1e-2, 6, 2), ("qlora", 6e-3, 10, 1)],
    ids=["lora", "qlora"],
)
def test_from_rows_to_a_merged_model_that_predicts(
    encoder: str,
    data: Path,
    method: str,
    rate: float,
    epochs: int,
    workers: int,
    tmp_path: Path,
) -> None:
    values = {
        "task": "text-classification",
        "model": {
            "name": encoder,
            "overrides": {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
        },
        "train": str(data / "train"),
        "eval": str(data / "dev"),
        "output": str(tmp_path / "out"),
        "method": method,
        "tokenizer": {"add_special_tokens": ["<yes>", "<no>"]},
        "schedule": {"epochs": epochs, "learning_rate": rate},
        "batch": {"size": 16},
        "compute": {"dtype": "float32"},
        "workers": {"count": workers, "cpus": 1},
    }
    spec = FinetuneSpec.build(values)
    result = finetune_here(spec)
    best, merged = result.metrics["best"], result.metrics["merged"]
    assert result.metrics["before"]["accuracy"] < 0.9 <= merged["accuracy"]
    assert merged["loss"] == pytest.approx(best["loss"], rel=1e-3)
    assert result.metrics["merge"]["difference"] == max(abs(merged[name] - best[name]) for name in merged)
    out = Path(result.output)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == encoder
    assert not list((out / "model").glob("adapter*"))
    found = predicted("text-classification", result.model, data / "dev", tmp_path / "scores")
    labels = pq.read_table(data / "dev")["label"].to_pylist()
    right = np.array(found["label"].to_pylist()) == np.array(labels)
    assert right.mean() == pytest.approx(merged["accuracy"])


def test_a_merge_that_changes_the_loss_is_reported() -> None:
    before, near, far = ({"loss": loss, "accuracy": 0.9} for loss in (1.0, 1.005, 1.02))
    assert compare(before, near) == {
        "merged": near,
        "merge": {"metric": "loss", "difference": pytest.approx(0.005)},
    }
    (note,) = compare(before, far)["notes"]
    assert "changed the loss from 1 to 1.02" in note
