"""Two processes that share a model (FSDP2) train it as one that holds it whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from torch.multiprocessing.spawn import ProcessExitedException
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTImageProcessor,
)

from hfbatch.errors import SpecError
from hfbatch.runtime.machine import Node
from hfbatch.spec.finetune import FinetuneSpec, TrainWorkersSpec
from hfbatch.train.loop.fsdp import layers_to_share
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from hfbatch.train.plan import make_finetune_plan
from hfbatch.train.worker_group import choose_worker_group
from tests.cases.every import CASES
from tests.train.test_every_recipe import PARAMS, ROWS
from tests.train.tools import (
    Stopped,
    assert_same_weights,
    run_both,
    run_here,
    spec_of,
    worker_config_of,
    write_rows,
)

pytestmark = pytest.mark.timeout(300)

SHARED = {"workers": {"count": 2, "cpus": 1, "strategy": "fsdp"}}
APART = {"workers": {"count": 2, "cpus": 1, "strategy": "ddp"}}
STILL = {
    "dropout_rate": 0.0, "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
"""Random numbers go by batches, and these by processes: without them both trainings are the same but for rounding."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"), held_out=33)


def assert_near(one: Path, other: Path) -> None:
    """The weights of two models but for the keys' bias, which adds the same to all scores of a query and so has no
    gradient: Adam makes steps of what rounding leaves there."""
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name in [name for name in mine if not name.endswith(("key.bias", "k_proj.bias"))]:
        np.testing.assert_allclose(mine[name], theirs[name], atol=2e-4, err_msg=name)


def run_shared(order: TrainWorkerConfig, folder: Path, stop: int | None = None) -> dict[str, Any]:
    """Trains in two processes. :returns: the last news of the first one.

    They begin again when one of them has died, as Ray Train lets them: torch's shards on CPUs are not made for production,
    and a process was once ended by SIGSEGV. So a training may have gone on from a later checkpoint than it was left with.
    """
    folder.mkdir()
    for attempt in range(3):
        try:
            run_both(order, folder / str(attempt), stop)
            return json.loads((folder / str(attempt) / "news-0.json").read_text())
        except ProcessExitedException as error:
            if error.signal_name != "SIGSEGV" or attempt == 2:
                raise
    raise AssertionError("a third attempt returns or raises")


def test_layers_are_gathered_one_by_one_but_for_tied_weights(encoder: str) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(encoder)
    assert layers_to_share(plain) == ["BertEmbeddings", "BertLayer"]
    tied = AutoModelForMaskedLM.from_pretrained(encoder)
    assert layers_to_share(tied) == ["BertLayer"]
    unnamed = torch.nn.ModuleList(
        [torch.nn.Identity(), torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))]
    )
    assert layers_to_share(unnamed) == ["Linear"]
    assert layers_to_share(torch.nn.Linear(2, 2)) == []


def of_task(name: str, model: str, folder: Path, **changes: Any) -> TrainWorkerConfig:
    """A training of two steps with the rows of a task, evaluated at its end."""
    config = AutoConfig.from_pretrained(model)
    still = {field: value for field, value in STILL.items() if hasattr(config, field)}
    pq.write_table(pa.table(dict(ROWS[name])), folder / "rows.parquet")
    return worker_config_of(
        FinetuneSpec.build(
            {
                "task": name, "model": {"name": model, "overrides": still}, "train": str(folder / "rows.parquet"),
                "eval": str(folder / "rows.parquet"), "params": PARAMS.get(name, {}), "batch": {"size": 16},
                "schedule": {"steps": 2, "learning_rate": 1e-4, "warmup": 0}, "compute": {"dtype": "float32"},
                "evaluation": {"every": 2}, "report_to": [], **changes,
            }
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "fill-mask",
        "text-generation",
        "summarization",
        "image-classification",
        "audio-classification",
        "embedding",
    ],
)
def test_any_kind_of_model_can_be_shared(name: str, tmp_path: Path) -> None:
    model = CASES[name].build(tmp_path / "base")
    shared = of_task(name, model, tmp_path, output=str(tmp_path / "shared"), **SHARED)
    run_shared(shared, tmp_path / "run")
    alone = {"workers": {"count": 1, "cpus": 1}}
    run_here(of_task(name, model, tmp_path, output=str(tmp_path / "alone"), **alone), tmp_path)
    assert_near(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "batch": {"size": 16, "per_device": 4},
            "compute": {"dtype": "float32", "gradient_checkpointing": True},
        },
        {"method": {"name": "lora", "dropout": 0}},
    ],
    ids=["full", "lora"],
)
def test_a_shared_training_that_stops_goes_on(
    encoder: str, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes |= {"schedule": {"steps": 4, "learning_rate": 5e-3, "warmup": 0}, "evaluation": {"every": 2}}
    order = worker_config_of(spec_of(data, encoder, tmp_path / "stopped", **SHARED, **changes))
    with pytest.raises(Exception, match=Stopped.__name__):
        run_shared(order, tmp_path / "first", stop=3)
    assert run_shared(order, tmp_path / "second")["resumed_at"] >= 2
    run_shared(
        worker_config_of(spec_of(data, encoder, tmp_path / "shared", **SHARED, **changes)), tmp_path / "run"
    )
    assert_same_weights(str(tmp_path / "stopped" / "model"), str(tmp_path / "shared" / "model"))
    run_here(worker_config_of(spec_of(data, encoder, tmp_path / "alone", **changes)), tmp_path)
    assert_near(tmp_path / "shared", tmp_path / "alone")


def test_a_weight_that_never_has_a_gradient_does_not_keep_a_training_from_going_on(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    out = str(tmp_path / "out")
    changes = {"evaluation": {"every": 1}, **SHARED}
    order = of_task("image-classification", str(tmp_path / "base"), tmp_path, output=out, **changes)
    with pytest.raises(Exception, match=Stopped.__name__):
        run_shared(order, tmp_path / "first", stop=1)
    assert run_shared(order, tmp_path / "second")["resumed_at"] >= 1
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_embeddings_are_compared_in_float32_whatever_passes_compute_in(tmp_path: Path) -> None:
    model, low = CASES["embedding"].build(tmp_path / "base"), {"compute": {"dtype": "bfloat16"}}
    run_shared(
        of_task("embedding", model, tmp_path, output=str(tmp_path / "out"), **SHARED, **low), tmp_path / "run"
    )
    assert (tmp_path / "out" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"schedule": {"optimizer": "adafactor"}}, "adafactor does not support sharded weights; use adamw"),
        ({"schedule": {"optimizer": "adamw_8bit"}}, "adamw_8bit does not support sharded weights; use adamw"),
        ({"compute": {"dtype": "float16"}}, "float16 cannot resume from a sharded checkpoint; use bfloat16"),
    ],
)
def test_what_shards_cannot_do_is_refused(
    data: Path, encoder: str, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(SpecError, match=fault):
        spec_of(data, encoder, Path("out"), **SHARED, **changes)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(
        SpecError, match=r"at least two processes, and there may be only 1; set workers\.count and"
    ):
        choose_worker_group(TrainWorkersSpec(count=2, at_least=1, gpus=1, strategy="fsdp"), [Node(8, 2)])


def test_checkpoints_of_one_strategy_are_not_for_the_other(data: Path, encoder: str, tmp_path: Path) -> None:
    one, other = (
        make_finetune_plan(spec_of(data, encoder, tmp_path / "out", **how)).fingerprint
        for how in (SHARED, APART)
    )
    assert one != other
