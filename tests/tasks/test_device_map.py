"""Models larger than a device: the layers that do not fit are read from disk, and the results are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import engine_faults
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.models.text import CORPUS, tiny_bert, tiny_bert_encoder, tiny_bert_for, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
SPREAD = {"name": "torch", "device_map": "auto", "memory": {"cpu": "300KB"}}
COLUMN = {
    "text-generation": {"max_new_tokens": 5, "do_sample": False},
    "text-classification": {},
    "fill-mask": {},
}


def spec_of(folder: str, task: str, engine: Any, **more: Any) -> JobSpec:
    values = {
        "task": task,
        "model": {"name": folder, "dtype": more.pop("dtype", "float32")},
        "engine": engine,
    }
    return JobSpec.build({**values, "input": "in", "output": "out", "params": COLUMN.get(task, {}), **more})


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("text-generation", "float32"), ("text-generation", "bfloat16"), ("text-classification", "bfloat16"),
        ("fill-mask", "float32"),
    ],
)  # fmt: skip
def test_layers_on_disk_give_the_same_bits(tmp_path: Path, task: str, dtype: str) -> None:
    if task == "fill-mask":
        folder = tiny_bert_for(tmp_path, "MaskedLM", **SIZES)
    else:
        folder = (tiny_llama if task == "text-generation" else tiny_bert)(tmp_path, **SIZES)
    found, texts = [], [f"{text} [MASK]" if task == "fill-mask" else text for text in CORPUS[:12]]
    for engine in ("torch", SPREAD):
        spec = spec_of(folder, task, engine, dtype=dtype)
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
        runner._threads = 2
        runner.apply(RuntimeChoice(4, dtype, "cpu"))
        made = runner.run({"text": pa.array(texts)})
        assert len(made.positions) == 12
        found.append({name: column.to_pylist() for name, column in made.columns.items()})
    assert found[0] == found[1]
    assert runner.engine.parallel == 1
    places = {weight.device.type for weight in runner.engine.model.parameters()}
    assert places == {"cpu", "meta"}  # those on meta are on disk


def test_what_cannot_be_spread_is_refused(tmp_path: Path) -> None:
    folder = tiny_bert_encoder(tmp_path / "encoder")

    def faults_of(task: str, model: str = folder, **more: Any) -> list[str]:
        spec = spec_of(model, task, SPREAD, **more)
        return engine_faults(spec.engine, "float32", RunnerConfig.of(spec, pin(spec.model)).build_task())

    assert faults_of("embedding") == []
    (fault,) = faults_of("embedding", tokenizer={"add_tokens": ["covid"]})
    assert "tokens cannot be added to a model on several devices" in fault
    (fault,) = faults_of("feature-extraction", params={"attentions": True})
    assert "task feature-extraction needs the PyTorch module of the model on one device" in fault
    for engine, message in (
        ({"name": "torch", "memory": {"cpu": "1GB"}}, "add device_map: auto, or leave memory out"),
        ({**SPREAD, "quantization": "int8"}, "device_map cannot spread weights that are quantised"),
        ({**SPREAD, "memory": {"cpu": "much"}}, "memory"),
        ({**SPREAD, "memory": {"tpu": "1GB"}}, "memory"),
        ({"name": "continuous", "device_map": "auto"}, "unknown key 'engine.device_map'"),
    ):
        with pytest.raises(SpecError, match=message):
            spec_of(folder, "embedding", engine)
