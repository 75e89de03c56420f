"""Engines that run a graph exported from the model: what they refuse, keep, and compare before they use it.

That they give the answers of transformers is tested in tests/jobs/test_every_task.py.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock
from pydantic import TypeAdapter
from transformers import AutoModel, BertConfig, BigBirdConfig, LongformerConfig, PretrainedConfig
from typer.testing import CliRunner

from hfbatch.cli.app import app
from hfbatch.engines import ENGINES
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.exported import ExportedEngine
from hfbatch.engines.exports import KEY, SCRATCH, cache_folder, cached_export, cached_exports
from hfbatch.engines.openvino import OpenVINOEngine, computes_in_bfloat16
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import pin
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.engines import EngineSpec
from hfbatch.spec.job import BatchSpec, ModelSpec
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, part_names, read_output, sentences, write_shards

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def engine_on(folder: str, commit: str = "1") -> OpenVINOEngine:
    return OpenVINOEngine(EngineConfig(folder, "AutoModel", "float32", commit=commit))


def batch_of(rows: int, width: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(rows).integers(5, 90, (rows, width))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def hidden(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    return {"hidden": model(**batch).last_hidden_state}


def embedded(model: str, engine: str, dtype: str) -> tuple[np.ndarray, Any]:
    """Embeddings of a few texts by a runner with one thread, and the graph that it loaded."""
    section = TypeAdapter(EngineSpec).validate_python(engine)
    config = RunnerConfig("embedding", pin(ModelSpec(name=model)), {}, dtype, BatchSpec(size=8), section)
    runner = Runner(config, share=1e-9)
    made = runner.run({"text": pa.array(sentences(12))}).columns["embedding"]
    (graph,) = cast(ExportedEngine, runner.engine).model._graphs.values()
    return np.stack(made.to_numpy(zero_copy_only=False)), graph


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with one layer, which is exported in half of the time of one with two."""
    folder = tmp_path_factory.mktemp("tiny")
    AutoModel.from_config(BertConfig(vocab_size=99, **TINY)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HFBATCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"engine": "onnx", "model.dtype": "bfloat16"}, "onnx does not compute in bfloat16; set model.dtype to float32"),
        ({"engine": "openvino", "workers.gpus": 1}, "openvino computes on CPUs; leave workers.gpus out"),
        ({"engine": "openvino", "task": "feature-extraction", "params": {"attentions": True}}, "openvino cannot run task feature-extraction, which needs the PyTorch module"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_in_the_plan(
    tmp_path: Path, encoder: str, changes: dict[str, Any], fault: str
) -> None:
    write_shards(tmp_path / "in", ["a [MASK]"], shards=1)
    values = {"task": "embedding", "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    values["model"] = {"name": encoder}
    for dotted, value in changes.items():
        section, _, name = dotted.partition(".")
        values[section] = {**values.get(section, {}), name: value} if name else value
    with pytest.raises(SpecError, match=fault):
        make_plan(type(make_spec("embedding", encoder, tmp_path, tmp_path)).build(values))


def test_an_engine_whose_package_is_missing_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.engines.find_spec", lambda name: None)
    write_shards(tmp_path / "in", ["a"], shards=1)
    with pytest.raises(SpecError, match=r"needs openvino; pip install 'hfbatch\[openvino\]'"):
        make_plan(make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", engine="openvino"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BigBirdConfig(vocab_size=99, block_size=4, num_random_blocks=1, **TINY), "another way from some length on"),
        (LongformerConfig(vocab_size=99, attention_window=4, **TINY), "cannot be exported"),
    ],
)  # fmt: skip
def test_a_model_whose_graph_would_be_wrong_at_other_lengths_ends_the_job(
    tmp_path: Path, config: PretrainedConfig, message: str
) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(WorkerError, match=message):
        engine_on(str(tmp_path), commit=config.model_type).prepare(batch_of(2, 9), hidden)


def test_a_model_is_exported_once_for_each_commit_and_set_of_inputs_and_not_used_where_it_gives_other_results(
    tiny: str, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    export = OpenVINOEngine.export
    monkeypatch.setattr(OpenVINOEngine, "export", lambda *arguments: made.append(1) or export(*arguments))
    first = engine_on(tiny)
    first.prepare(batch_of(1, 6), hidden)
    wanted = first.collect(first.submit(batch_of(3, 11), hidden))["hidden"]
    again = engine_on(tiny)
    np.testing.assert_array_equal(again.collect(again.submit(batch_of(3, 11), hidden))["hidden"], wanted)
    without_mask = {"input_ids": batch_of(3, 11)["input_ids"]}
    np.testing.assert_array_equal(again.collect(again.submit(without_mask, hidden))["hidden"], wanted)
    assert len(made) == 1

    monkeypatch.setattr(OpenVINOEngine, "open", shifted)
    with pytest.raises(WorkerError, match="gives other results"):
        engine_on(tiny, "2").prepare(batch_of(2, 6), hidden)
    assert len(made) == 2
    runner = CliRunner()
    (listed,) = json.loads(runner.invoke(app, ["cache", "--json"]).stdout)
    assert (listed["engine"], listed["model"], listed["quantization"]) == ("openvino", "1", "none")
    assert listed["bytes"] > 10_000

    cached_export({**listed, "model": "3"}, (), lambda folder: None)
    assert "2 exported models" in runner.invoke(app, ["cache"]).stdout
    assert len(json.loads(runner.invoke(app, ["cache", "--clear", "--json"]).stdout)) == 2
    assert json.loads(runner.invoke(app, ["cache", "--json"]).stdout) == []


OPENED = OpenVINOEngine.open


def shifted(engine: OpenVINOEngine, folder: Path, precise: bool = False) -> Any:
    """A graph whose results are wrong."""
    graph = OPENED(engine, folder, precise)

    def run(**inputs: Any) -> Any:
        outputs = graph(**inputs)
        outputs.last_hidden_state = outputs.last_hidden_state + 0.1
        return outputs

    return run


@pytest.mark.parametrize(("engine", "least"), [("openvino", 0.99), ("onnx", 0.98)])
def test_a_quantised_graph_has_8_bit_weights_is_near_the_model_and_gives_a_job_that_goes_on_the_same_bits(
    tmp_path: Path, short_minilm: str, engine: str, least: float
) -> None:
    tables = {}
    for quantization in ("int8", "none"):
        out = tmp_path / quantization
        section = {"name": engine, "quantization": quantization, "guard": "skip"}
        write_shards(tmp_path / "in", sentences(24))
        spec = make_spec(
            "embedding", short_minilm, tmp_path / "in", out, engine=section, input={"split_rows": 6}
        )
        assert job_here(spec).exit_code == 0
        tables[quantization] = read_output(out)
        job = json.loads((out / "__hfbatch/job.json").read_text())
        assert job["settled"]["engine"] == engine
        assert {*ENGINES[engine].needs(quantization)} <= {*job["versions"]}
        if quantization == "int8":
            _lose_half(out)
            assert job_here(spec).exit_code == 0
            assert read_output(out).equals(tables["int8"])

    commit = pin(ModelSpec(name=short_minilm)).commit
    made = {
        key["quantization"]: folder
        for folder, key in cached_exports().items()
        if (key["engine"], key["model"]) == (engine, commit)
    }
    assert {*made} == {"none", "int8"}
    assert matrices_of(made["int8"]) <= {"int8", "uint8"}
    assert matrices_of(made["none"]) == {"float32"}
    found, wanted = (np.stack(tables[name]["embedding"].to_numpy()) for name in ("int8", "none"))
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert least < cosine.min() < 1 - 1e-5


def _lose_half(out: Path) -> None:
    """Leaves an output as a job that was killed leaves it."""
    for name in part_names(out)[:2]:
        (out / name).unlink()
    (out / "_SUCCESS").unlink()


def matrices_of(folder: Path) -> set[str]:
    """Types of a graph's constants of two dimensions with more than 100,000 values."""
    if (folder / "openvino_model.xml").is_file():
        import openvino

        nodes = openvino.Core().read_model(folder / "openvino_model.xml").get_ops()
        found = [
            (node.shape, node.get_element_type().to_dtype().name)
            for node in nodes
            if node.get_type_name() == "Constant"
        ]
    else:
        import onnx

        weights = onnx.load(folder / "model.onnx").graph.initializer
        found = [(one.dims, onnx.helper.tensor_dtype_to_np_dtype(one.data_type).name) for one in weights]
    return {kind for shape, kind in found if len(shape) == 2 and math.prod(shape) > 100_000}


def test_what_a_killed_export_has_left_is_removed_by_the_next(own_cache: None) -> None:
    left, under_way = (cache_folder() / f"{name}{SCRATCH}" for name in ("left", "under_way"))
    for folder in (left, under_way):
        (folder / "export").mkdir(parents=True)
    with FileLock(under_way.with_suffix(".lock")):
        cached_export({"engine": "none"}, (), lambda folder: None)
    assert not left.exists()
    assert under_way.is_dir()
    with pytest.raises(OSError, match="disk full"):
        cached_export({"engine": "other"}, (), fail)
    assert not [*cache_folder().glob(f"*{SCRATCH}")]
    assert len(cached_exports()) == 1


def test_an_export_that_cannot_be_read_is_listed_and_deleted(own_cache: None) -> None:
    folder = cached_export({"engine": "none"}, (), lambda folder: None)
    (folder / KEY).write_text("")
    for flags in ([], ["--clear"]):
        found = json.loads(CliRunner().invoke(app, ["cache", "--json", *flags]).stdout)
        assert [one["engine"] for one in found] == ["unreadable"]
    assert not folder.exists()


def fail(folder: Path) -> None:
    raise OSError("disk full")


def test_the_precision_is_the_one_asked_for(short_minilm: str) -> None:
    found = {}
    hints = {"float32": "f32"} | ({"bfloat16": "bf16"} if computes_in_bfloat16() else {})
    for dtype, hint in hints.items():
        found[dtype], graph = embedded(short_minilm, "openvino", dtype)
        compiled = graph.runners["model"].compiled_model
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == hint
    if "bfloat16" in found:
        assert 0 < np.abs(found["float32"] - found["bfloat16"]).max() < 0.02


def test_a_cpu_without_bfloat16_is_reported(short_minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbatch.engines.openvino.computes_in_bfloat16", lambda: False)
    with pytest.raises(WorkerError, match="does not compute in bfloat16 on this CPU"):
        embedded(short_minilm, "openvino", "bfloat16")


def test_openvino_reports_nothing_to_its_makers() -> None:
    from openvino.tools.ovc import telemetry_utils

    assert sys.modules["openvino_telemetry"] is None
    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_engines_are_listed_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {one["name"]: one for one in json.loads(CliRunner().invoke(app, ["engines", "--json"]).stdout)}
    assert {*listed} == {*ENGINES}
    assert listed["onnx"] | {"summary": ""} == {
        "name": "onnx", "summary": "", "dtypes": ["float32"], "gpus": False, "missing": [], "install": None,
        "quantizations": {"int8": []}, "compile": None, "apart": None,
    }  # fmt: skip
    assert "engine.python" in listed["vllm"]["apart"]
    monkeypatch.setattr("hfbatch.engines.find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    shown = CliRunner().invoke(app, ["engines"], env={"COLUMNS": "200"}).stdout
    assert "hfbatch[onnx]" in shown
    assert "runs in an endpoint (engine.url)" in " ".join(shown.split())
    assert "engine.compile of torch: needs the C++ compiler no-such-compiler" in shown


def test_onnx_takes_the_threads_of_its_worker(short_minilm: str) -> None:
    _, graph = embedded(short_minilm, "onnx", "float32")
    assert graph.runners["model"].session.get_session_options().intra_op_num_threads == 1
