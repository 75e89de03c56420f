"""Folders that hold a graph in place of weights: which engines run them, what is read by name, and what is refused."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hfbatch.engines.openvino import computes_in_bfloat16
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import Model, pin
from hfbatch.predict.plan import make_plan
from hfbatch.predict.preview import preview
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec, ModelSpec
from hfbatch.train.plan import make_finetune_plan
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, sentences, write_shards
from tests.models.graphs import as_openvino, tiny_graph


def spec_on(folder: Path, tmp_path: Path, task: str = "text-classification", **changes: Any) -> JobSpec:
    if not (tmp_path / "in").exists():
        write_shards(tmp_path / "in", sentences(12), shards=1)
    sections = {"engine": "onnx", "model": {"dtype": "auto"}, **changes}
    return make_spec(task, str(folder), tmp_path / "in", tmp_path / "out", **sections)


def runner_on(spec: JobSpec) -> Runner:
    plan = make_plan(spec)
    return Runner(plan.runner, share=1e-9)


def refused(folder: Path, tmp_path: Path, task: str = "text-classification", **changes: Any) -> str:
    """The error of a batch."""
    with pytest.raises(WorkerError) as caught:
        runner_on(spec_on(folder, tmp_path, task, **changes)).run(
            {"text": pa.array(["short", *sentences(3)])}
        )
    return str(caught.value)


def faults(folder: Path, tmp_path: Path, task: str = "text-classification", **changes: Any) -> list[str]:
    """The errors of a plan."""
    with pytest.raises(SpecError) as caught:
        make_plan(spec_on(folder, tmp_path, task, **changes))
    return caught.value.faults


def means_of(folder: Path, weights: np.ndarray, texts: list[str]) -> np.ndarray:
    """The softmax of what `tiny_graph` computes for texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    means = np.stack([weights[tokenizer(text, truncation=True).input_ids].mean(0) for text in texts])
    powers = np.exp(means - means.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("engine", "inside", "external"),
    [("onnx", "", ""), ("onnx", "onnx/", "model.onnx_data"), ("openvino", "", "")],
)
def test_a_graph_is_run_as_it_is(tmp_path: Path, engine: str, inside: str, external: str) -> None:
    folder = tmp_path / "model"
    weights = tiny_graph(folder, inside=inside, external=external)
    if engine == "openvino":
        as_openvino(folder)
    spec = spec_on(folder, tmp_path, engine=engine)
    assert job_here(spec).exit_code == 0
    found = read_output(tmp_path / "out").to_pylist()
    wanted = means_of(folder, weights, sentences(12))
    for row, scores in zip(found, wanted, strict=True):
        assert row["label"] == f"class {scores.argmax()}"
        np.testing.assert_allclose(row["score"], scores.max(), rtol=1e-5)
    settled = json.loads((tmp_path / "out/__hfbatch/job.json").read_text())["settled"]
    assert (settled["engine"], settled["dtype"], settled["quantization"]) == (engine, "float32", "none")


def test_the_vectors_of_a_sentence_transformers_export_are_pooled_here(tmp_path: Path) -> None:
    """By the pooling files beside it; one that takes no types gets none, and one that takes them gets zeros."""
    folder = tmp_path / "model"
    found = []
    for takes in (("input_ids", "attention_mask"), ("input_ids", "attention_mask", "token_type_ids")):
        weights = tiny_graph(folder, "token_embeddings", takes=takes)
        runner = runner_on(spec_on(folder, tmp_path, "embedding"))
        made = runner.run({"text": pa.array(sentences(5))}).columns["embedding"]
        found.append(np.stack(made.to_numpy(zero_copy_only=False)))
    ids = AutoTokenizer.from_pretrained(folder)(sentences(5)[0], truncation=True).input_ids
    np.testing.assert_allclose(found[0][0], weights[ids].mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("made", "task", "message"),
    [
        ({"output": "last_hidden_state", "head": "ForSequenceClassification"}, "text-classification", "has no output 'logits', which the task reads (it has: last_hidden_state)"),
        ({}, "feature-extraction", "has no output 'last_hidden_state', which the task reads (it has: logits)"),
        ({"sizes": (1, "tokens")}, "text-classification", "takes 'input_ids' with a fixed size of 1"),
        ({"sizes": ("rows", 64)}, "text-classification", "takes 'input_ids' with a fixed size of 64"),
        ({"takes": ("input_ids",), "output": "last_hidden_state"}, "embedding", "has no input 'attention_mask', which the model reads"),
        ({"takes": ("input_ids", "attention_mask", "token_type_ids", "position_ids")}, "text-classification", "takes 'position_ids', which the task does not give"),
    ],
)  # fmt: skip
def test_a_graph_that_is_not_one_of_the_task_ends_the_job(
    tmp_path: Path, made: dict[str, Any], task: str, message: str
) -> None:
    tiny_graph(tmp_path / "model", **made)
    error = refused(tmp_path / "model", tmp_path, task)
    assert message in error
    assert "model.onnx" in error


def test_a_pair_needs_the_types_of_its_tokens(tmp_path: Path) -> None:
    """A graph without them would give another answer, and no error."""
    tiny_graph(tmp_path / "model", takes=("input_ids", "attention_mask"))
    columns = {"text": pa.array(["a b"]), "text_pair": pa.array(["c d"])}
    runner = runner_on(spec_on(tmp_path / "model", tmp_path))
    with pytest.raises(WorkerError, match="has no input 'token_type_ids', which the model reads"):
        runner.run(columns)


def test_classes_without_a_name_end_the_job(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    few = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "model/config.json").write_text(json.dumps(config | few))
    assert "has 8 classes, and id2label of config.json names 2" in refused(tmp_path / "model", tmp_path)


def test_the_dtype_is_that_of_the_graph(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "model", half=True)
    runner = runner_on(spec_on(tmp_path / "model", tmp_path))
    engine, choice = runner.load(), runner.default_choice()
    assert (engine.dtype, choice.dtype) == ("float16", "float16")
    runner.apply(choice)
    assert runner.engine is engine, "it is not loaded again"
    wanted = refused(tmp_path / "model", tmp_path, model={"dtype": "float32"})
    assert "computes in float16, not in float32; leave model.dtype out" in wanted


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_openvino_computes_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    tiny_graph(tmp_path / "model")
    as_openvino(tmp_path / "model")
    if dtype == "bfloat16" and not computes_in_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    runner = runner_on(spec_on(tmp_path / "model", tmp_path, engine="openvino", model={"dtype": dtype}))
    assert runner.load().dtype == ("float32" if dtype == "auto" else dtype)


def test_a_graph_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "model")
    found = preview(spec_on(tmp_path / "model", tmp_path)).guard
    assert found is not None
    assert found["status"] == "unguarded"
    assert found["summary"] == (
        "the graph model.onnx in onnx (float32) was not compared with float32: the model is a graph; there are no weights "
        "to compare it with"
    )
    assert (
        preview(spec_on(tmp_path / "model", tmp_path, engine={"name": "onnx", "guard": "skip"})).guard is None
    )


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("text-classification", {"engine": "torch"}, "engine torch: model '{}' has no safetensors weights: its weights are a graph (model.onnx), which engine: onnx runs as it is"),
        ("text-classification", {"engine": "openvino"}, "which engine: onnx runs as it is"),
        ("text-classification", {"engine": "auto"}, "which engine: onnx runs as it is"),
        ("text-classification", {"engine": {"name": "onnx", "quantization": "int8"}}, "is a graph, which runs as it is; leave engine.quantization out"),
        ("text-classification", {"engine": {"name": "onnx", "guard": "required"}}, "engine.guard required: model '{}' is a graph"),
        ("text-classification", {"tokenizer": {"add_tokens": ["blorp"]}}, "gets no more tokens"),
        ("text-classification", {"model": {"dtype": "bfloat16"}}, "onnx does not compute in bfloat16"),
        ("feature-extraction", {"params": {"attentions": True}}, "needs the PyTorch module of the model, and model '{}' is a graph"),
    ],
)  # fmt: skip
def test_what_a_graph_cannot_do_is_refused_in_the_plan(
    tmp_path: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    tiny_graph(tmp_path / "model")
    (fault,) = faults(tmp_path / "model", tmp_path, task, **changes)
    assert message.format(tmp_path / "model") in fault


def test_a_graph_is_not_fine_tuned(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "model")
    model = {"name": str(tmp_path / "model")}
    with pytest.raises(SpecError, match=r"its weights are a graph \(model.onnx\).*; here weights are needed"):
        pin(ModelSpec(**model))
    spec = {
        "task": "text-classification",
        "train": str(tmp_path),
        "output": str(tmp_path / "o"),
        "model": model,
    }
    with pytest.raises(SpecError, match="here weights are needed"):
        make_finetune_plan(FinetuneSpec.build(spec))


def test_safetensors_go_before_a_graph(tmp_path: Path) -> None:
    """The graph beside them is neither used nor part of the model's identity."""
    tiny_graph(tmp_path / "model", inside="onnx/", external="model.onnx_data")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    before = pin(ModelSpec(name=str(tmp_path / "model")), graphs=True)
    assert before.graphs == {}
    assert before.size()[0] > 0
    (tmp_path / "model/onnx/model.onnx").write_bytes(b"other")
    assert pin(ModelSpec(name=str(tmp_path / "model")), graphs=True).commit == before.commit


def test_all_files_of_a_graph_are_part_of_the_identity(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_graph(folder, inside="onnx/", external="model.onnx_data")
    commits = [pin(ModelSpec(name=str(folder)), graphs=True).commit]
    for name in ("onnx/model.onnx_data", "onnx/model.onnx"):
        with (folder / name).open("ab") as file:
            file.write(b"more")
        commits.append(pin(ModelSpec(name=str(folder)), graphs=True).commit)
    assert len({*commits}) == 3
    (folder / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(SpecError, match=r"openvino_model.bin, the weights of openvino_model.xml, is missing"):
        pin(ModelSpec(name=str(folder)), graphs=True)
    (folder / "openvino_model.xml").unlink()
    (folder / "onnx/model.onnx_data").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SpecError, match=r"onnx/model.onnx_data is a Git LFS pointer"):
        pin(ModelSpec(name=str(folder)), graphs=True)


@pytest.mark.parametrize("place", ["../outside", "{}/outside", "link"])
def test_weights_outside_the_folder_are_not_read(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    tiny_graph(folder, external="model.onnx_data")
    (folder / "model.onnx_data").rename(tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for weights in graph.graph.initializer:
        for entry in weights.external_data:
            entry.value = place.format(tmp_path) if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    message = refused(folder, tmp_path)
    assert "engine onnx cannot read the graph model.onnx" in message
    assert "xternal data" in message


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_damaged_graph_ends_the_job(tmp_path: Path, engine: str) -> None:
    tiny_graph(tmp_path / "model")
    if engine == "openvino":
        as_openvino(tmp_path / "model")
    (file,) = (*(tmp_path / "model").glob("*.onnx"), *(tmp_path / "model").glob("*.xml"))
    file.write_bytes(file.read_bytes()[:200])
    message = refused(tmp_path / "model", tmp_path, engine=engine)
    assert f"engine {engine} cannot read the graph {file.name}" in message


def test_a_graph_of_the_hub_is_found_in_the_cache_and_fetched_with_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "2" * 40, tmp_path / "models--org--tiny"
    tiny_graph(repository / "blobs", inside="onnx/", external="model.onnx_data")
    snapshot = repository / "snapshots" / commit
    for path in (repository / "blobs").rglob("*.*"):
        place = snapshot / path.relative_to(repository / "blobs")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)  # as the Hub's cache has it
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = pin(ModelSpec(name="org/tiny"), graphs=True)
    assert model.graphs == {"onnx": "onnx/model.onnx"}
    assert model.version == f"{commit}/graph"
    assert model.fetch() == model
    spec = spec_on(Path("org/tiny"), tmp_path)
    made = Runner(RunnerConfig.of(spec, model), share=1e-9).run({"text": pa.array(sentences(3))})
    assert len(made.columns["label"]) == 3


def test_of_the_hub_only_the_files_of_the_graph_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **how: asked.append(how) or "/there"
    )
    Model("org/tiny", "/here", "3", hub=True, graphs={"onnx": "onnx/model.onnx"}).fetch()
    ignored, allowed = asked[0]["ignore_patterns"], asked[1]["allow_patterns"]

    def fetched(name: str) -> bool:
        return not any(fnmatch(name, one) for one in ignored) or any(fnmatch(name, one) for one in allowed)

    assert fetched("config.json")
    assert fetched("onnx/model.onnx")
    assert fetched("onnx/model.onnx_data")
    others = (
        "pytorch_model.bin",
        "onnx/model_O2.onnx",
        "onnx/decoder.onnx_data",
        "openvino/openvino_model.xml",
    )
    assert not [name for name in others if fetched(name)]
