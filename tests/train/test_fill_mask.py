"""Training fill-mask: the loss is that of transformers, and what is hidden depends on seed, epoch and row alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers.loss.loss_utils import ForMaskedLMLoss

from hfbatch.train.data.rows import LENGTH, FeatureRows
from hfbatch.train.loop.checkpoints import Checkpoints
from hfbatch.train.loop.loop import train
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from hfbatch.train.recipes.fill_mask import FIXED, hide
from tests.models.text import CORPUS, tiny_bert_for, tiny_llama
from tests.train.drive import Bench

MASK = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert_for(tmp_path_factory.mktemp("masked"), "MaskedLM")


def bench_of(model: str, texts: list[str], **options: Any) -> Bench:
    return Bench("fill-mask", model, {"text": texts}, **options).ready()


def hidden_of(bench: Bench, *numbers: int) -> list[tuple[list[int], list[int]]]:
    """What the model sees of each row and what it is asked for, without padding."""
    batch = bench.batch(*numbers)
    lengths = [
        len(bench.features["input_ids"][number % len(bench.features)])
        for number in numbers or range(len(bench.features))
    ]
    return [
        (seen[:length].tolist(), asked[:length].tolist())
        for seen, asked, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True)
    ]


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_step_without_targets_has_no_loss(model: str, items: Any) -> None:
    bench = bench_of(model, [" ", "  "])
    batch = bench.batch()
    labels = batch.pop("labels")
    loss = bench.recipe.loss(bench.model(**batch), labels, items)
    loss.backward()
    assert (float(loss.detach()), int((labels >= 0).sum())) == (0, 0)
    assert all(weight.grad is None or not weight.grad.any() for weight in bench.model.parameters())


def test_the_loss_is_that_of_transformers(model: str) -> None:
    bench = bench_of(model, CORPUS[:8])
    batch = bench.batch()
    outputs = bench.model(**batch)
    torch.testing.assert_close(bench.loss(batch), outputs.loss)
    expected = ForMaskedLMLoss(
        outputs.logits, batch["labels"], outputs.logits.shape[-1], num_items_in_batch=77
    )
    torch.testing.assert_close(bench.loss(batch, 77), expected)


def test_a_step_has_the_same_loss_however_it_is_cut(model: str) -> None:
    bench = bench_of(model, CORPUS[:8])
    whole = bench.batch()
    items = int(whole["labels"].ne(-100).sum())
    parts = [bench.loss(bench.batch(*numbers), items) for numbers in ([3, 0], [1], [7, 2, 5, 6, 4])]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


def test_what_is_hidden_depends_on_seed_epoch_and_row_alone(model: str) -> None:
    bench = bench_of(model, CORPUS[:20])
    whole = hidden_of(bench)
    assert hidden_of(bench, 13, 4) == [whole[13], whole[4]]
    later = hidden_of(bench, *range(20, 40))
    assert sum(one != other for one, other in zip(whole, later, strict=True)) > 15
    assert hidden_of(bench_of(model, CORPUS[:20], seed=1)) != whole
    assert hidden_of(bench_of(model, CORPUS[:20])) == whole


def test_tokens_are_masked_replaced_and_kept_in_the_shares_of_bert(model: str) -> None:
    bench = bench_of(model, CORPUS)
    ids = [row.as_py() for row in bench.features["input_ids"]]
    asked = masked = kept = tokens = 0
    for epoch in range(20):
        numbers = range(epoch * len(ids), (epoch + 1) * len(ids))
        for row, (seen, labels) in zip(ids, hidden_of(bench, *numbers), strict=True):
            hidden = np.array(labels) != -100
            assert (np.array(labels)[hidden] == np.array(row)[hidden]).all()
            assert (np.array(seen)[~hidden] == np.array(row)[~hidden]).all()
            assert hidden.any()
            assert not hidden[[0, -1]].any()
            tokens, asked = tokens + len(row) - 2, asked + hidden.sum()
            masked += (np.array(seen)[hidden] == MASK).sum()
            kept += (np.array(seen)[hidden] == np.array(row)[hidden]).sum()
    assert asked / tokens == pytest.approx(0.15, abs=0.01)
    assert masked / asked == pytest.approx(0.8, abs=0.02)
    assert kept / asked == pytest.approx(0.1, abs=0.02)


def test_words_are_hidden_whole(model: str) -> None:
    bench = bench_of(model, CORPUS[:20], params={"whole_words": True, "mask_probability": 0.4})
    names = bench.recipe.task.tokenizer.convert_ids_to_tokens
    pairs = 0
    for epoch in range(5):
        numbers = range(epoch * 20, (epoch + 1) * 20)
        for number, (_, labels) in zip(numbers, hidden_of(bench, *numbers), strict=True):
            tokens = names(bench.features["input_ids"][number % 20].as_py())
            hidden = [label != -100 for label in labels]
            later = [place for place, token in enumerate(tokens) if token.startswith("##")]
            assert all(hidden[place] == hidden[place - 1] for place in later)
            pairs += sum(hidden[place] for place in later)
    assert pairs > 20


def test_units_are_hidden_whole_and_at_least_one() -> None:
    units = np.array([FIXED, 0, 0, 1, 2, 2, FIXED])
    random = np.random.default_rng(0)
    counts = [np.unique(units[hide(units, 0.5, random)]) for _ in range(400)]
    assert np.mean([len(found) for found in counts]) == pytest.approx(1.5, abs=0.1)
    assert {unit for found in counts for unit in found.tolist()} == {0, 1, 2}
    assert len(np.unique(units[hide(units, 0.01, random)])) == 1
    assert not hide(np.array([FIXED, FIXED]), 0.5, random).any()


def test_nothing_of_a_long_text_is_lost(model: str) -> None:
    texts = [" ".join(CORPUS[:9]), "short", " ".join(CORPUS[9:14])]
    bench = bench_of(model, texts, batch={"max_length": 16})
    rows = bench.features["hfbatch_row"].to_pylist()
    assert max(map(len, bench.features["input_ids"].to_pylist())) == 16
    for number, text in enumerate(texts):
        pieces = [
            ids
            for ids, row in zip(bench.features["input_ids"].to_pylist(), rows, strict=True)
            if row == number
        ]
        joined = [token for ids in pieces for token in ids[1:-1]]
        assert joined == bench.recipe.task.tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [seen for seen, _ in hidden_of(bench)]
    assert len(windows) == len(rows) > 6
    assert bench.features["window"].to_pylist()[:3] == [0, 1, 2]


def test_training_on_tokens_improves_the_metrics(model: str) -> None:
    bench = bench_of(model, CORPUS[:6])
    first, last = bench.learn(60)
    assert last < first / 2
    found = bench.metrics()
    batch = bench.batch()
    with torch.no_grad():
        outputs = bench.model(**batch)
    asked = batch["labels"] != -100
    assert found["perplexity"] == pytest.approx(float(outputs.loss.exp()), rel=1e-5)
    right = outputs.logits.argmax(-1)[asked] == batch["labels"][asked]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))
    assert found["accuracy"] > 0.8


def test_faults_of_rows_and_models_are_reported(model: str, tmp_path: Any) -> None:
    found = Bench("fill-mask", model, {"text": ["a", None, ""]}).validate()
    assert found.faults == [f"rows.parquet row {row}: text is null or empty" for row in (1, 2)]
    nothing = Bench("fill-mask", model, {"text": pa.array(["a"]).dictionary_encode()}).validate()
    assert nothing.faults == []
    (fault,) = Bench("fill-mask", tiny_llama(tmp_path), {"text": ["a"]}).recipe.check()
    assert "without a mask token" in fault


def test_what_is_hidden_differs_from_epoch_to_epoch_and_training_goes_on_with_the_same(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "output": str(tmp_path / "out"),
        "schedule": {"epochs": 3, "learning_rate": 1e-2},
        "batch": {"size": 4, "per_device": 2},
        "evaluation": {"every": 2, "keep": 9},
        "compute": {"dtype": "float32"},
    }
    bench = bench_of(model, CORPUS[:14], **options)
    for part in ("train", "eval"):
        (tmp_path / "features" / part).mkdir(parents=True)
        lengths = pa.array(bench.recipe.lengths(bench.features))
        pq.write_table(
            bench.features.append_column(LENGTH, lengths), tmp_path / "features" / part / "rows.parquet"
        )
    seen: list[int] = []
    take = FeatureRows.take

    def noted(rows: FeatureRows, numbers: list[int]) -> pa.Table:
        seen.extend(numbers)
        return take(rows, numbers)

    monkeypatch.setattr(FeatureRows, "take", noted)
    order = TrainWorkerConfig(bench.spec, bench.recipe.task.model, {}, str(tmp_path / "features"))
    states = []
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        train(order, tmp_path / attempt, 0, 1, lambda news: None)
        checkpoints = Checkpoints(f"{order.state}/checkpoints")
        assert checkpoints.steps() == [2, 4, 6, 8, 10, 12]
        states.append(load_file(Path(checkpoints.path(12)) / "model.safetensors"))
        for step in (8, 10, 12):
            shutil.rmtree(checkpoints.path(step))
        if attempt == "one":
            assert set(seen) >= set(range(42))
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=0, atol=0)
