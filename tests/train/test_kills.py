"""Kill a fine-tuning anywhere: the same command finishes it, and the model has the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import psutil
import pytest

from hfbatch.errors import WorkerError
from hfbatch.train.run import finetune
from tests.jobs.tools import start_job
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


def wait_for_checkpoint(job: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not there():
        assert job.poll() is None, job.communicate()[0]
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

    job = start_job(spec, tmp_path, "local")  # type: ignore[arg-type]
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
    job = start_job(spec, tmp_path, ray_cluster)  # type: ignore[arg-type]
    wait_for_checkpoint(job, lambda: any((tmp_path / "out").glob("__hfbatch/checkpoints/*/MANIFEST.json")))
    job.send_signal(signal.SIGINT)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 130, printed
    assert "the same command resumes from there" in " ".join(printed.split())
    assert "Traceback" not in printed
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


NODE_LOSS = """
import os, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.forked_workers import use_forked_workers
import ray
from hfbatch.train.run import finetune
from hfbatch.spec.finetune import FinetuneSpec

spec = FinetuneSpec.load(sys.argv[1])
# A node that is gone is missed after three seconds, one that is slow to answer after thirty, and processes that have no
# node to start on are given up after ten.
missed = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
use_forked_workers()
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": missed})
node = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

def lose_a_node():
    while not list(Path(spec.output).glob("__hfbatch/checkpoints/*/MANIFEST.json")):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    print("node lost")

threading.Thread(target=lose_a_node, daemon=True).start()
finetune(spec, quiet=True)
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_leaves_fewer_workers_at_the_same_steps(
    data: Path, encoder: str, tmp_path: Path, forked: None
) -> None:
    workers = {"count": 2, "at_least": 1, "cpus": 1}
    long = {"epochs": 10, "learning_rate": 1e-3}
    spec = spec_of(data, encoder, tmp_path / "out", workers=workers, schedule=long)
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    command = [sys.executable, "-c", NODE_LOSS, str(tmp_path / "spec.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node lost" in done.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 8 <= metrics["resumed_at"] < 10 * 8
    found = metrics["evaluations"]
    alone, _ = run_here(worker_config_of(spec_of(data, encoder, tmp_path / "alone", schedule=long)), tmp_path)
    wanted = [entry for entry in alone["log"] if "eval_loss" in entry]
    assert [entry["step"] for entry in found] == [entry["step"] for entry in wanted]
    assert [entry["loss"] for entry in found] == pytest.approx(
        [entry["eval_loss"] for entry in wanted], rel=1e-3
    )
