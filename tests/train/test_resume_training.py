"""A training that ends early goes on as if nothing had been: same rows, same weights, on any number of processes.

Here without Ray; test_finetune.py and test_kills.py do it with Ray.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModel

from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import pin
from hfbatch.spec.finetune import BaseModelSpec, FinetuneSpec
from hfbatch.train.data.rows import LENGTH
from hfbatch.train.loop.checkpoints import MANIFEST, Checkpoints
from hfbatch.train.loop.model import load_weights
from hfbatch.train.loop.sampler import NO_ROW, ShuffledRows
from hfbatch.train.loop.training import check_weights
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from tests.cases.every import CASES
from tests.train.test_every_recipe import ROWS
from tests.train.tools import (
    Stopped,
    assert_same_weights,
    run_both,
    run_here,
    spec_of,
    worker_config_of,
    write_rows,
)

EPOCH = 8
"""Steps of an epoch: 120 rows in steps of 16."""
EVERY_3 = {"evaluation": {"every": 3, "keep": 2}, "compute": {"dtype": "float32"}}
MEASURED = [0, 3, 6, 9, 12, 15, 16]
EPOCHS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), held_out=33)


def fresh(data: Path, encoder: str, out: Path, dropout: bool = False, **changes: Any) -> TrainWorkerConfig:
    """An order with checkpoints every third step, so in the middle of epochs."""
    schedule = {"epochs": EPOCHS, "learning_rate": 5e-3}
    spec = spec_of(data, encoder, out, **{"schedule": schedule, **EVERY_3, **changes})
    model = spec.model if not dropout else spec.model.model_copy(update={"overrides": {}})
    return worker_config_of(spec.model_copy(update={"model": model}))


@pytest.fixture(scope="module")
def whole(data: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output of a training that nobody disturbed, with dropout, and its last news."""
    out = tmp_path_factory.mktemp("whole")
    news, _ = run_here(fresh(data, encoder, out, dropout=True), out)
    return out, news


@pytest.fixture(scope="module")
def stopped(data: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> TrainWorkerConfig:
    """The same, ended after step 10: checkpoints of step 6 and of step 9, the first step of the second epoch."""
    out = tmp_path_factory.mktemp("stopped")
    order = fresh(data, encoder, out, dropout=True)
    with pytest.raises(Stopped):
        run_here(order, out, stop=10)
    assert store(order).steps()[-2:] == [6, 9]
    return order


def store(order: TrainWorkerConfig) -> Checkpoints:
    return Checkpoints(f"{order.state}/checkpoints")


def copied(order: TrainWorkerConfig, out: Path) -> TrainWorkerConfig:
    """The same training in a copy of its output."""
    shutil.copytree(order.spec.output, out, dirs_exist_ok=True)
    spec = order.spec.model_copy(update={"output": str(out)})
    return TrainWorkerConfig(spec, order.model, order.fitted, order.features)


def left_after(step: int, order: TrainWorkerConfig) -> Counter[int]:
    """How often each row is in a batch of the steps that are left; what fills up a step counts as row 0."""
    lengths = pq.read_table(f"{order.features}/train/part-000000.parquet")[LENGTH].to_numpy()
    left: Counter[int] = Counter()
    for epoch in range(step // EPOCH, EPOCHS):
        sampler = ShuffledRows(lengths, 16, 0, True)
        sampler.set_epoch(epoch)
        skipped = max(step - epoch * EPOCH, 0) * 16
        left.update(0 if row == NO_ROW else row for row in list(sampler)[skipped:])
    return left


def measured(news: dict[str, Any]) -> list[int]:
    return [entry["step"] for entry in news["log"] if "eval_loss" in entry]


def losses(news: dict[str, Any]) -> list[float]:
    return [entry["eval_loss"] for entry in news["log"] if "eval_loss" in entry]


def test_going_on_in_the_middle_of_an_epoch_changes_not_one_bit(
    whole: tuple[Path, dict[str, Any]], stopped: TrainWorkerConfig, tmp_path: Path
) -> None:
    out, undisturbed = whole
    order = copied(stopped, tmp_path)
    news, taken = run_here(order, tmp_path)
    assert taken == left_after(9, order)
    assert_same_weights(str(tmp_path / "model"), str(out / "model"))
    assert measured(news) == measured(undisturbed) == MEASURED
    assert news["best_step"] == undisturbed["best_step"]
    assert losses(news) == losses(undisturbed)


def cut_off(folder: Path) -> None:
    state = folder / "optimizer.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])


def gone(folder: Path) -> None:
    (folder / "scheduler.pt").unlink()


def killed_before_its_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [cut_off, gone, killed_before_its_manifest])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_no_more(
    damage: Any, whole: tuple[Path, dict[str, Any]], stopped: TrainWorkerConfig, tmp_path: Path
) -> None:
    order = copied(stopped, tmp_path)
    damage(Path(store(order).path(9)))
    news, taken = run_here(order, tmp_path)
    assert taken == left_after(6, order)
    assert measured(news) == MEASURED
    assert_same_weights(str(tmp_path / "model"), str(whole[0] / "model"))


def test_a_training_that_was_over_trains_no_further_step(data: Path, encoder: str, tmp_path: Path) -> None:
    order = fresh(data, encoder, tmp_path, schedule={"steps": 10, "learning_rate": 5e-3})
    first, _ = run_here(order, tmp_path)
    assert measured(first) == [0, 3, 6, 9, 10]
    (tmp_path / "model" / "config.json").unlink()  # as if the export had been cut short
    with pytest.raises(SpecError, match=r"config\.json"):
        pin(BaseModelSpec(name=str(tmp_path / "model")))
    again, taken = run_here(order, tmp_path)
    assert taken == Counter()
    assert losses(again) == losses(first)
    assert again["best_step"] == first["best_step"]
    assert pin(BaseModelSpec(name=str(tmp_path / "model")))


def test_patience_outlives_a_stop_and_its_end_is_an_end(data: Path, encoder: str, tmp_path: Path) -> None:
    still = {"evaluation": {"every": 3, "keep": 2, "patience": 2, "metric": "accuracy"}}
    slow = {"schedule": {"epochs": 3, "learning_rate": 1e-12}}
    order = fresh(data, encoder, tmp_path, **still, **slow)
    with pytest.raises(Stopped):
        run_here(order, tmp_path, stop=6)
    news, _ = run_here(order, tmp_path)
    assert measured(news) == [0, 3, 6, 9]  # the first is the best, two are no better
    again, taken = run_here(order, tmp_path)
    assert taken == Counter()
    assert measured(again) == [0, 3, 6, 9]


def test_checkpoints_hold_no_pickled_objects(stopped: TrainWorkerConfig) -> None:
    files = sorted(Path(store(stopped).path(9)).iterdir())
    names = {path.name for path in files}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST} <= names
    assert "training_args.bin" not in names
    import numpy as np

    arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    with torch.serialization.safe_globals(arrays):
        for path in files:
            if path.suffix in {".pt", ".pth"}:
                torch.load(
                    path, weights_only=True
                )  # raises for anything but tensors, numbers and NumPy's arrays


def test_a_machine_that_leaves_is_saved_before(
    whole: tuple[Path, dict[str, Any]], data: Path, encoder: str, tmp_path: Path
) -> None:
    order = fresh(data, encoder, tmp_path, dropout=True)
    with pytest.raises(Stopped):
        run_here(order, tmp_path, stop=5, leaving=lambda: True)
    assert store(order).steps()[-1] == 5
    news, taken = run_here(order, tmp_path)
    assert taken == left_after(5, order)
    assert measured(news) == MEASURED
    assert_same_weights(str(tmp_path / "model"), str(whole[0] / "model"))


def test_a_model_that_computes_no_numbers_is_never_saved(data: Path, encoder: str, tmp_path: Path) -> None:
    huge = {"schedule": {"learning_rate": 1e37, "warmup": 0}, "evaluation": {"every": 1}}
    order = fresh(data, encoder, tmp_path, **huge)
    with pytest.raises(WorkerError, match="the loss of the evaluation set is nan; lower schedule"):
        run_here(order, tmp_path)
    assert store(order).steps() == []
    model = torch.nn.Linear(2, 2)
    check_weights(model, 1)
    model.bias.data[1] = torch.inf
    with pytest.raises(WorkerError, match="weights are not finite after step 1; lower schedule"):
        check_weights(model, 1)


def test_bfloat16_learns_what_float32_learns(data: Path, encoder: str, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        changes = {"schedule": {"epochs": 3, "learning_rate": 5e-3}, "evaluation": {"every": "epoch"}}
        order = fresh(data, encoder, tmp_path / dtype, compute={"dtype": dtype}, **changes)
        news, _ = run_here(order, tmp_path)
        found[dtype] = losses(news)
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.05)
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"][-1] < found["bfloat16"][0] / 2


def test_two_processes_go_on_as_two_or_as_one(data: Path, encoder: str, tmp_path: Path) -> None:
    alone, _ = run_here(fresh(data, encoder, tmp_path / "alone"), tmp_path)
    order = fresh(data, encoder, tmp_path / "two")
    with pytest.raises(Exception, match="Stopped"):
        run_both(order, tmp_path / "first", stop=10)
    assert store(order).steps()[-2:] == [6, 9]
    one = copied(order, tmp_path / "one")
    news, taken = run_here(one, tmp_path)
    assert taken == left_after(9, order)
    assert measured(news) == MEASURED
    assert losses(news) == pytest.approx(losses(alone), rel=1e-3)
    assert run_both(order, tmp_path / "second") == left_after(9, order)


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model whose weights have other names in its file than in memory."""
    model = CASES["image-classification"].build(tmp_path_factory.mktemp("first-release"))
    live, saved = set(AutoModel.from_pretrained(model).state_dict()), load_file(f"{model}/model.safetensors")
    assert not live & {name.removeprefix("vit.encoder.") for name in saved if "attention" in name}
    return model


@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_models_that_are_saved_under_the_names_of_their_first_release_go_on(
    method: str, loop: str, first_release: str, tmp_path: Path
) -> None:
    task, rows = "image-classification", str(tmp_path / "rows.parquet")
    pq.write_table(pa.table(dict(ROWS[task])), rows)
    values = {
        "task": task, "model": first_release, "train": rows, "eval": rows, "output": str(tmp_path / "out"), "loop": loop,
        "method": {"name": method, "dropout": 0}, "schedule": {"steps": 4, "learning_rate": 1e-3, "warmup": 0},
        "batch": {"size": 4}, "evaluation": {"every": 2, "keep": 2}, "compute": {"dtype": "float32"},
    }  # fmt: skip
    order = worker_config_of(FinetuneSpec.build(values))
    undisturbed, _ = run_here(order, tmp_path)
    shutil.move(tmp_path / "out" / "model", tmp_path / "whole")
    shutil.rmtree(store(order).path(4))  # as if it had ended before
    news, _ = run_here(order, tmp_path)
    assert news["resumed_at"] == 2
    assert losses(news) == losses(undisturbed)
    assert len(losses(news)) == 3
    assert_same_weights(str(tmp_path / "whole"), str(tmp_path / "out" / "model"))


def test_a_checkpoint_that_has_not_all_weights_is_refused(encoder: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(encoder)
    model.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.bias")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        WorkerError, match=r"1 weights of the checkpoint do not fit the model, such as encoder\.layer\.0"
    ):
        load_weights(model, tmp_path)
