"""What transformers' training arguments make of a spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfbatch.train.loop.arguments import arguments
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from hfbatch.train.plan import make_finetune_plan
from tests.train.tools import spec_of, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 6), (5, 5), (0, 0)])
def test_warmup_below_one_is_a_share_of_the_steps(
    warmup: float, steps: int, data: Path, encoder: str, tmp_path: Path
) -> None:
    made = arguments(ordered(data, encoder, tmp_path, schedule={"warmup": warmup}), tmp_path, 1)
    assert made.get_warmup_steps(24) == steps


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("per_device", ["auto", 2])
def test_batches_of_all_workers_make_up_a_step(
    world: int, per_device: int | str, data: Path, encoder: str, tmp_path: Path
) -> None:
    batch = {"size": 48, "per_device": per_device}
    made = arguments(ordered(data, encoder, tmp_path, batch=batch), tmp_path, world)
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps * world == 48
    assert made.per_device_train_batch_size == (per_device if per_device == 2 else 48 // max(world, 2))


def ordered(data: Path, encoder: str, out: Path, **changes: object) -> TrainWorkerConfig:
    """The order of a training whose features nobody has written."""
    plan = make_finetune_plan(spec_of(data, encoder, out, **changes))
    return TrainWorkerConfig(
        plan.spec, plan.model, {"kind": "single", "labels": ["no", "yes"], "counts": {}}, "none"
    )
