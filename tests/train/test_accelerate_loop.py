"""The loop on plain Accelerate: the same losses, metrics and weights as transformers' Trainer, and the same resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hfbatch.errors import SpecError
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from tests.train.tools import (
    TRAIN_ROWS,
    Stopped,
    assert_same_weights,
    run_both,
    run_here,
    spec_of,
    worker_config_of,
    write_rows,
)

STEPS_OF_BOTH = {
    "batch": {"size": 20, "per_device": 5},
    "evaluation": {"every": 5},
    "schedule": {"epochs": 2, "learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), held_out=33)


def order_for(
    data: Path, model: str, out: Path, loop: str = "accelerate", **changes: Any
) -> TrainWorkerConfig:
    """Steps of several passes, measured in the middle of epochs too."""
    return worker_config_of(spec_of(data, model, out, loop=loop, **{**STEPS_OF_BOTH, **changes}))


def train(data: Path, model: str, folder: Path, loop: str, **changes: Any) -> dict[str, Any]:
    """The last news of a training in this process."""
    return run_here(order_for(data, model, folder / loop, loop, **changes), folder)[0]


@pytest.fixture(scope="module")
def whole(data: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The last news of a training of all weights that nobody disturbed, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return train(data, encoder, folder, "accelerate"), folder / "accelerate" / "model"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_both_loops_give_the_same_losses_metrics_and_weights(
    data: Path, encoder: str, whole: tuple[dict[str, Any], Path], tmp_path: Path, method: str
) -> None:
    changes: dict[str, Any] = {"method": {"name": method, "dropout": 0}}
    trainers = train(data, encoder, tmp_path, "trainer", **changes)
    if method == "full":
        plain, model = whole
    else:
        plain, model = (
            train(data, encoder, tmp_path, "accelerate", **changes),
            tmp_path / "accelerate" / "model",
        )
    assert plain["best_step"] == trainers["best_step"]
    for part in ("loss", "eval_loss"):
        mine, theirs = ([one for one in news["log"] if part in one] for news in (plain, trainers))
        assert [one["step"] for one in mine] == [one["step"] for one in theirs] != []
        assert [one[part] for one in mine] == pytest.approx([one[part] for one in theirs], rel=1e-5)
    weights = [load_file(folder / "model.safetensors") for folder in (model, tmp_path / "trainer" / "model")]
    for name, weight in weights[0].items():
        assert weight == pytest.approx(weights[1][name], abs=1e-5), name


@pytest.mark.parametrize("loop", ["accelerate", "trainer"])
def test_of_equals_the_model_with_the_lower_loss_is_the_best(
    data: Path, encoder: str, tmp_path: Path, loop: str
) -> None:
    changes = {"batch": {"size": 20}, "schedule": {"epochs": 5, "learning_rate": 5e-3}}
    news = train(data, encoder, tmp_path, loop, **changes)
    measured = [entry for entry in news["log"] if "eval_loss" in entry and entry["step"]]
    top = max(entry["eval_accuracy"] for entry in measured)
    equals = [entry for entry in measured if entry["eval_accuracy"] == top]
    assert len(equals) > 1
    assert news["best_step"] == min(equals, key=lambda entry: entry["eval_loss"])["step"] > equals[0]["step"]


def test_part_of_an_epoch_is_a_step_at_least(data: Path, encoder: str, tmp_path: Path) -> None:
    steps = []
    for loop in ("accelerate", "trainer"):
        news = train(
            data, encoder, tmp_path, loop, batch={"size": 64}, schedule={"epochs": 0.2}, evaluation={}
        )
        steps.append(news["best_step"])
    assert steps == [1, 1]


def test_it_goes_on_from_its_checkpoint_as_if_nothing_had_happened(
    data: Path, encoder: str, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    halved = order_for(data, encoder, tmp_path / "halved")
    with pytest.raises(Stopped):
        run_here(halved, tmp_path / "b", stop=7)
    news, taken = run_here(halved, tmp_path / "c")
    assert news["resumed_at"] == 5
    assert sum(taken.values()) < 2 * TRAIN_ROWS
    assert_same_weights(str(whole[1]), str(tmp_path / "halved" / "model"))


def test_two_processes_see_every_row_once_an_epoch_and_learn_the_same(
    data: Path, encoder: str, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    taken = run_both(order_for(data, encoder, tmp_path / "two"), tmp_path / "b")
    assert all(taken[row] == 1 for row in range(1, 2 * TRAIN_ROWS))  # numbers of the second epoch go on
    mine, theirs = (
        load_file(folder / "model.safetensors") for folder in (whole[1], tmp_path / "two" / "model")
    )
    for name, weight in mine.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which Adam makes steps of
            assert weight == pytest.approx(theirs[name], abs=1e-3), name


@pytest.mark.parametrize("changes", [{"compute": {"compile": True}}, {"workers": {"strategy": "fsdp"}}])
def test_what_it_cannot_do_is_refused(
    data: Path, encoder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(SpecError, match="use loop: trainer"):
        spec_of(data, encoder, tmp_path, loop="accelerate", **changes)


def test_patience_ends_it(data: Path, encoder: str, tmp_path: Path) -> None:
    changes = {
        "evaluation": {"every": 1, "patience": 2, "metric": "accuracy"}, "schedule": {"epochs": 9, "learning_rate": 1e-12},
    }  # fmt: skip
    news = train(data, encoder, tmp_path, "accelerate", **changes)
    assert [one["step"] for one in news["log"] if "eval_loss" in one] == [0, 1, 2, 3]
    assert news["best_step"] == 1
