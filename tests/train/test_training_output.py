"""The output folder of a training: written to by one training at a time, checked before work, tidy after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hfbatch.errors import LockLostError, OutputHeldError, SpecError
from hfbatch.output.layout import INNER, OLD_INNER
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import hold
from hfbatch.spec.location import Location
from hfbatch.train.loop.worker_config import TrainWorkerConfig, check_shares
from hfbatch.train.plan import look_again, make_finetune_plan
from hfbatch.train.run import _clear, _tidy, finetune
from hfbatch.train.status import read_training
from tests.train.tools import run_here, spec_of, worker_config_of, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


def test_an_output_that_cannot_be_written_is_reported_before_work(
    data: Path, encoder: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SpecError, match=r"output .*/file is a file; give a folder"):
        make_finetune_plan(spec_of(data, encoder, tmp_path / "file"))
    with pytest.raises(SpecError, match=r"output /proc/no/folder cannot be written: .*; give a folder"):
        make_finetune_plan(spec_of(data, encoder, Path("/proc/no/folder")))


@pytest.mark.parametrize(
    "name", ["model", "adapter", "tensorboard", "metrics.json", "report.html", "_SUCCESS"]
)
def test_what_no_training_wrote_is_never_overwritten(
    data: Path, encoder: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    for overwrite in (False, True):
        with pytest.raises(
            SpecError, match=f"holds {name}, but no training .*; choose another folder, or move"
        ):
            make_finetune_plan(spec_of(data, encoder, tmp_path), overwrite)
    assert (tmp_path / name).exists()


def test_the_output_of_a_job_is_never_overwritten_by_a_training(
    data: Path, encoder: str, tmp_path: Path
) -> None:
    spec = spec_of(data, encoder, tmp_path)
    Ledger(str(tmp_path)).write_job({"spec": {"input": {}}, "identity": {}})
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="holds the output of a job; choose another folder"):
            make_finetune_plan(spec, overwrite)


def test_one_training_at_a_time(data: Path, encoder: str, tmp_path: Path) -> None:
    spec = spec_of(data, encoder, tmp_path)
    with hold(str(tmp_path), print), pytest.raises(OutputHeldError, match="is being written by"):
        finetune(spec, quiet=True)
    assert [path.name for path in tmp_path.rglob("*")] == []
    plan = make_finetune_plan(spec)
    Ledger(str(tmp_path)).write_job(
        {**plan.job(), "identity": {**plan.identity, "seed": 7}}
    )  # since the plan
    with pytest.raises(SpecError, match="holds another training; it differs in seed"):
        look_again(plan, False)
    look_again(plan, True)


def test_a_training_of_the_version_before_is_continued(data: Path, encoder: str, tmp_path: Path) -> None:
    spec = spec_of(data, encoder, tmp_path)
    plan = make_finetune_plan(spec)
    Ledger(str(tmp_path)).write_job(plan.job())
    (tmp_path / INNER).rename(tmp_path / OLD_INNER)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "metrics.json").write_text('{"evaluations": [{"step": 3}], "best": {}}')
    assert make_finetune_plan(spec).finished
    assert read_training(str(tmp_path))["step"] == 3
    with pytest.raises(SpecError, match="holds another training; it differs in seed"):
        make_finetune_plan(spec.model_copy(update={"seed": 7}))
    assert finetune(spec, quiet=True).finished
    assert (tmp_path / INNER / "job.json").exists()
    assert not (tmp_path / OLD_INNER).exists()


def test_a_training_that_lost_the_output_saves_nothing(data: Path, encoder: str, tmp_path: Path) -> None:
    order = worker_config_of(spec_of(data, encoder, tmp_path))
    with hold(str(tmp_path), print) as lock:
        lost = replace(order, claim=replace(lock.claim, token="another"))
        with pytest.raises(LockLostError, match="this run writes nothing more"):
            run_here(lost, tmp_path)
    assert not (tmp_path / "__hfbatch" / "checkpoints").exists()
    assert not (tmp_path / "model").exists()
    remote = replace(order, claim=replace(lost.claim, out=Location("s3://KEY:SECRET@lake/out")))
    again = TrainWorkerConfig.from_json(remote.to_json())
    assert again.claim.out.unmasked == "s3://KEY:SECRET@lake/out"
    assert "SECRET" not in repr(again)


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(
    data: Path, encoder: str, tmp_path: Path
) -> None:
    order = worker_config_of(spec_of(data, encoder, tmp_path))
    (tmp_path / "__hfbatch" / "checkpoints").mkdir()
    (tmp_path / "__hfbatch" / "checkpoints" / "step-00000008").write_text("in the way")
    with pytest.raises(
        OSError, match=r"the checkpoint of step 8 cannot be written to .*; free space or grant access"
    ):
        run_here(order, tmp_path)


def test_overwriting_and_tidying_delete_what_is_ours_alone(data: Path, encoder: str, tmp_path: Path) -> None:
    for name in ("notes.txt", "model/config.json", "_SUCCESS", "metrics.json", "__hfbatch/job.json", "__hfbatch/report.html",
                 "__hfbatch/ray/run/marker", "__hfbatch/features-12/train/part", "__hfbatch/checkpoints/step-8/x"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    Ledger(str(tmp_path)).write_job({"spec": {"train": {}}})
    (tmp_path / "__hfbatch/lock-00000001.json").touch()
    _tidy(make_finetune_plan(spec_of(data, encoder, tmp_path), overwrite=True))
    assert {path.name for path in (tmp_path / "__hfbatch").iterdir()} == {
        "job.json",
        "report.html",
        "lock-00000001.json",
    }
    assert (tmp_path / "model" / "config.json").exists()
    _clear(str(tmp_path))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"notes.txt", "__hfbatch", "__hfbatch/lock-00000001.json"}


def test_elastic_workers_need_a_batch_that_each_number_of_them_divides() -> None:
    check_shares(24, "auto", 2, 4)
    with pytest.raises(
        SpecError, match=r"batch\.size 16 .* workers from 2 to 4; set batch\.size to a multiple of 12"
    ):
        check_shares(16, "auto", 2, 4)
    with pytest.raises(
        SpecError, match=r"over 4 workers is 6 rows each, which batch\.per_device 4 does not divide"
    ):
        check_shares(24, 4, 3, 4)
