"""Kill a fine-tuning anywhere: the same command finishes it, and the model has the same bits."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import psutil
import pytest

from hfbatch.errors import WorkerError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.run import finetune
from tests.jobs.tools import start_job
from tests.programs import Program, run_and_lose_a_node
from tests.train.tools import (
    assert_same_weights,
    killed_after_checkpoint,
    run_here,
    spec_of,
    worker_config_of,
    write_rows,
)

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


def wait_for_checkpoint(job: Program, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not there():
        assert job.poll() is None, job.output
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_on_s3_a_killed_driver_with_all_its_ray_loses_no_checkpoint(
    data: Path, encoder: str, s3: dict[str, str], tmp_path: Path, ray_cluster: str
) -> None:
    client, bucket = boto3.client("s3", endpoint_url=s3["endpoint"]), s3["bucket"]
    for part in ("train", "dev"):
        client.upload_file(str(data / part / "rows.parquet"), bucket, f"{part}/rows.parquet")
    spec = spec_of(
        data, encoder, tmp_path / "unused", train=f"s3://{bucket}/train", eval=f"s3://{bucket}/dev"
    )
    spec = spec.model_copy(update={"output": f"s3://{bucket}/out"})

    def keys() -> set[str]:
        listed = client.list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])
        return {key["Key"].removeprefix("out/") for key in listed if not key["Key"].endswith("/")}

    job = start_job(spec, tmp_path, "local")
    wait_for_checkpoint(job, lambda: any(key.endswith("/MANIFEST.json") for key in keys()))
    started = psutil.Process(job.pid)
    for process in [*started.children(recursive=True), started]:
        if process.is_running():
            process.kill()
    job.wait()
    assert not keys() & {"_SUCCESS", "metrics.json", "model/config.json"}

    finetune(spec, quiet=True)
    assert "_SUCCESS" in keys()
    wanted = {"_SUCCESS", "__hfbatch", "metrics.json", "model", "report.html", "tensorboard"}
    assert {key.split("/")[0] for key in keys()} == wanted
    assert {key for key in keys() if key.startswith("__hfbatch/")} == {"__hfbatch/job.json"}
    for key in ("metrics.json", "model/model.safetensors"):
        client.download_file(bucket, f"out/{key}", str(tmp_path / key.rpartition("/")[2]))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["resumed_at"] >= 8
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 8, 16, 24]
    run_here(worker_config_of(spec_of(data, encoder, tmp_path / "whole")), tmp_path)
    assert_same_weights(str(tmp_path), str(tmp_path / "whole" / "model"))


def test_ctrl_c_ends_it_and_says_how_to_go_on(
    ray_cluster: str, data: Path, encoder: str, tmp_path: Path
) -> None:
    spec = spec_of(data, encoder, tmp_path / "out", schedule={"epochs": 200})
    job = start_job(spec, tmp_path, ray_cluster)
    wait_for_checkpoint(job, lambda: any((tmp_path / "out").glob("__hfbatch/checkpoints/*/MANIFEST.json")))
    job.interrupt()
    assert job.wait(timeout=120) == 130, job.output
    assert "the same command resumes from there" in " ".join(job.output.split())
    assert "Traceback" not in job.output
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_failure_beyond_those_allowed_is_reported_in_one_sentence(
    ray_cluster: str, data: Path, encoder: str, tmp_path: Path
) -> None:
    workers = {"count": 1, "cpus": 1, "failures": 0}
    with (
        killed_after_checkpoint(tmp_path),
        pytest.raises(
            WorkerError,
            match=r"training ended early: a process died .* workers\.failures=0 allows; the same command",
        ) as caught,
    ):
        finetune(spec_of(data, encoder, tmp_path, workers=workers, schedule={"epochs": 200}), quiet=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "_SUCCESS").exists()


def lose_a_node() -> None:
    """Trains with the spec that the program's argument names, and loses a node after the first checkpoint."""
    spec = FinetuneSpec.load(sys.argv[1])
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"  # for processes that have no node to start on
    checkpoints = Path(spec.output)
    run_and_lose_a_node(
        lambda: finetune(spec, quiet=True) and None,
        lambda: any(checkpoints.glob("__hfbatch/checkpoints/*/MANIFEST.json")),
    )


def test_a_lost_node_leaves_fewer_workers_at_the_same_steps(
    data: Path, encoder: str, tmp_path: Path, forked: None
) -> None:
    workers = {"count": 2, "at_least": 1, "cpus": 1}
    long = {"epochs": 10, "learning_rate": 1e-3}
    spec = spec_of(data, encoder, tmp_path / "out", workers=workers, schedule=long)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    done = Program(lose_a_node, str(tmp_path / "spec.yaml"))
    assert done.wait(timeout=450) == 0, done.output
    assert "node lost" in done.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 8 <= metrics["resumed_at"] < 10 * 8
    found = metrics["evaluations"]
    alone, _ = run_here(worker_config_of(spec_of(data, encoder, tmp_path / "alone", schedule=long)), tmp_path)
    wanted = [entry for entry in alone["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted]
    assert [entry["loss"] for entry in found] == pytest.approx(
        [entry["eval_loss"] for entry in wanted], rel=1e-3
    )
