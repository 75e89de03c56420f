"""Fine-tuning as a user runs it: through Ray Train, from Parquet to a model that predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from hfbatch.errors import SpecError, WorkerError
from hfbatch.predict.verify import verify_output
from hfbatch.train.run import FinetuneResult, finetune
from tests.train.tools import (
    assert_same_weights,
    killed_after_checkpoint,
    predicted,
    run_here,
    spec_of,
    worker_config_of,
    write_rows,
)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with `label` yes where they hold "not"; 101 to measure with, which no number of workers divides."""
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(
    ray_cluster: str, encoder: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinetuneResult:
    """A training with one worker, which is killed after its first checkpoint."""
    spec = spec_of(data, encoder, tmp_path_factory.mktemp("one") / "out")
    with killed_after_checkpoint(Path(spec.output)):
        return finetune(spec, quiet=True)


@pytest.fixture(scope="module")
def undisturbed(encoder: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The model of the same training that nobody disturbed, without Ray, and its evaluations."""
    folder = tmp_path_factory.mktemp("undisturbed")
    news, _ = run_here(worker_config_of(spec_of(data, encoder, folder / "out")), folder)
    return folder / "out" / "model", [entry for entry in news["log"] if "eval_loss" in entry]


def test_a_killed_worker_delays_training_and_changes_nothing(
    trained: FinetuneResult, undisturbed: tuple[Path, Any]
) -> None:
    model, evaluations = undisturbed
    assert_same_weights(trained.model, str(model))
    assert trained.metrics["resumed_at"] >= 8
    assert [entry["step"] for entry in trained.metrics["evaluations"]] == [0, 8, 16, 24]
    assert [entry["loss"] for entry in trained.metrics["evaluations"]] == [
        entry["eval_loss"] for entry in evaluations
    ]


def test_the_model_predicts_the_labels_that_it_has_learnt(
    trained: FinetuneResult, data: Path, tmp_path: Path
) -> None:
    assert trained.metrics["before"]["accuracy"] < 0.9 <= trained.metrics["best"]["accuracy"]
    assert trained.metrics["data"]["rows"]["eval"]["rows"] == 101
    dev = ds.dataset(str(data / "dev")).to_table()["label"].to_pylist()
    assert trained.metrics["baseline"]["accuracy"] == pytest.approx(max(map(dev.count, ("yes", "no"))) / 101)
    found = predicted("text-classification", trained.model, data / "dev", tmp_path)["label"].to_pylist()
    assert np.mean([one == label for one, label in zip(found, dev, strict=True)]) == pytest.approx(
        trained.metrics["best"]["accuracy"]
    )


def test_the_number_of_workers_and_the_cut_of_a_step_change_rounding_alone(
    undisturbed: tuple[Path, Any], ray_cluster: str, encoder: str, data: Path, tmp_path: Path
) -> None:
    cut = {"size": 16, "per_device": 2}
    other = finetune(spec_of(data, encoder, tmp_path, workers={"count": 2, "cpus": 1}, batch=cut), quiet=True)
    for mine, theirs in zip(other.metrics["evaluations"], undisturbed[1], strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)


def test_a_rerun_of_a_finished_training_does_nothing_and_another_spec_is_refused(
    trained: FinetuneResult, encoder: str, data: Path
) -> None:
    out = Path(trained.output)
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    assert finetune(spec_of(data, encoder, out), quiet=True).metrics == json.loads(
        (out / "metrics.json").read_text()
    )
    with pytest.raises(SpecError, match=r"holds another training; it differs in seed \(there: 0, now: 1\)"):
        finetune(spec_of(data, encoder, out, seed=1), quiet=True)
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    (fault,) = verify_output(trained.output)
    assert "is the output of a training, not of a job" in fault


def test_faulty_rows_are_reported_together_before_training(
    ray_cluster: str, encoder: str, tmp_path: Path
) -> None:
    rows = {"train": (["fine", None, "bad"], ["yes", "no", None]), "dev": (["fine"], ["maybe"])}
    for part, (texts, labels) in rows.items():
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / part / "rows.parquet")
    with pytest.raises(SpecError) as caught:
        finetune(spec_of(tmp_path, encoder, tmp_path / "out"), quiet=True)
    assert caught.value.faults == [
        "train: rows.parquet row 2: label is null",
        "train: rows.parquet row 1: text is null or empty",
        "leave such rows out with train.filter and eval.filter, or fix them",
        "eval holds labels that no training row has: 'maybe' (training has: no, yes); leave these rows out with "
        "eval.filter, or add such rows to train",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"batch": {"size": 15}, "workers": {"count": 2, "cpus": 1}},
            r"batch\.size 15 does not divide by 2 workers",
        ),
        (
            {"workers": {"strategy": "fsdp"}},
            "fsdp shards a model over GPUs, and each process has 0; use ddp",
        ),
        ({"workers": {"count": 99, "cpus": 1}}, "99 of 1 CPUs .* do not fit into the cluster"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_before_work(
    ray_cluster: str, encoder: str, data: Path, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    with pytest.raises(SpecError, match=fault):
        finetune(spec_of(data, encoder, tmp_path / "out", **changes), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_training_with_one_sentence(
    ray_cluster: str, encoder: str, data: Path, tmp_path: Path
) -> None:
    schedule = {"learning_rate": 1e30, "epochs": 1}
    with pytest.raises(WorkerError, match=r"the loss is nan at step .* lower schedule.learning_rate"):
        finetune(spec_of(data, encoder, tmp_path, schedule=schedule), quiet=True)
