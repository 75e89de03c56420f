"""Where losses go: each destination is written for real and read back, by the first process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.loop.trackers import reporters, reporting_faults


def spec_of(output: str, *names: str) -> FinetuneSpec:
    values = {
        "task": "text-classification",
        "model": "m",
        "train": "in",
        "output": output,
        "report_to": names,
    }
    return FinetuneSpec.build(values)


def drive(spec: FinetuneSpec, local: Path, begin: int = 0) -> None:
    """Takes the callbacks through ten steps, as Trainer does."""
    arguments = TrainingArguments(str(local / "run"), report_to=[], run_name="mine", use_cpu=True)
    state, control = TrainerState(is_world_process_zero=True, global_step=begin), TrainerControl()
    for reporter in reporters(spec, local):
        reporter.on_train_begin(arguments, state, control)
        for step in range(begin + 1, begin + 11):
            state.global_step = step
            reporter.on_log(arguments, state, control, logs={"loss": 1 / step, "eval_accuracy": step / 100})
        reporter.on_save(arguments, state, control)
        reporter.on_train_end(arguments, state, control)


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = EventAccumulator(str(folder))
    logs.Reload()
    return {event.step: event.value for event in logs.Scalars(tag)}


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path) -> None:
    spec = spec_of(str(tmp_path / "out"), "tensorboard")
    drive(spec, tmp_path)
    drive(spec, tmp_path, begin=5)
    found = scalars(tmp_path / "out" / "tensorboard", "train/loss")
    assert found == pytest.approx({step: 1 / step for step in range(1, 16)})


def test_tensorboard_logs_get_to_s3(s3: dict[str, str], tmp_path: Path) -> None:
    drive(spec_of(f"s3://{s3['bucket']}/out", "tensorboard"), tmp_path)
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    listed = client.list_objects_v2(Bucket=s3["bucket"], Prefix="out/tensorboard/events")["Contents"]
    for one in listed:
        target = tmp_path / "back" / Path(one["Key"]).name
        target.parent.mkdir(exist_ok=True)
        client.download_file(s3["bucket"], one["Key"], str(target))
    assert scalars(tmp_path / "back", "eval/accuracy") == pytest.approx({n: n / 100 for n in range(1, 11)})


def test_mlflow_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    store = f"file://{tmp_path}/runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # in place of a server
    drive(spec_of("out", "mlflow"), tmp_path)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "mine"
    history = client.get_metric_history(run.info.run_id, "eval_accuracy")
    assert {one.step: one.value for one in history} == pytest.approx({n: n / 100 for n in range(1, 11)})


def test_faults_are_reported_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (fault,) = [one for one in reporting_faults(spec_of("out", "mlflow")) if "MLFLOW_TRACKING_URI" in one]
    assert "http://host:5000" in fault
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    assert "set WANDB_API_KEY, or WANDB_MODE=offline" in reporting_faults(spec_of("out", "wandb"))[-1]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not any("WANDB_API_KEY" in one for one in reporting_faults(spec_of("out", "wandb")))
    code = (
        "import sys\n"
        "sys.modules['wandb'] = None\n"  # as if it were not installed
        "from hfbatch.spec.finetune import FinetuneSpec\n"
        "from hfbatch.train.loop.trackers import reporting_faults\n"
        "print(reporting_faults(FinetuneSpec.build({'task': 't', 'model': 'm', 'train': 'i', 'output': 'o', "
        "'report_to': ['wandb']})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run `pip install wandb`" in done.stdout
