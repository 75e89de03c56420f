"""Compiled models and the threads of a model: what they give, what is refused, and what a rerun makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel

from hfbatch import JobSpec
from hfbatch.cluster.resources import lay_out
from hfbatch.engines import compilers
from hfbatch.engines.compiled import Compiled
from hfbatch.errors import SpecError, WorkerError
from hfbatch.hub.models import pin
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.machine import Node
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import WorkersSpec
from tests.jobs.here import job_here
from tests.models.quantised import quantised_checkpoint
from tests.models.text import CORPUS, tiny_bert_encoder, tiny_t5

COMPILED = {"name": "torch", "compile": True}


def spec_of(folder: str, engine: Any, out: Path, task: str = "embedding", **more: Any) -> JobSpec:
    values = {"task": task, "model": {"name": folder, "dtype": "float32"}, "engine": engine}
    return JobSpec.build(
        {**values, "input": {"path": str(out.parent / "in.parquet")}, "output": str(out), **more}
    )


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The rows of tmp_path/in.parquet, of many lengths."""
    rows = [" ".join(CORPUS[: k % 5 + 1]) for k in range(31)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "in.parquet")
    return rows


def vectors_of(folder: str | Path) -> np.ndarray:
    return np.array(pq.read_table(next(Path(folder).glob("part-*")))["embedding"].to_pylist())


@pytest.fixture
def faults_of(tmp_path: Path, texts: list[str]) -> Any:
    """The faults of a plan."""

    def found(*arguments: Any, **more: Any) -> list[str]:
        with pytest.raises(SpecError) as caught:
            make_plan(spec_of(*arguments, tmp_path / "out", **more))
        return caught.value.faults

    return found


@pytest.mark.matrix
def test_a_compiled_model_gives_what_it_gives_as_it_is_and_reruns_too(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    folder = tiny_bert_encoder(tmp_path / "model", num_hidden_layers=1)
    job_here(spec_of(folder, "torch", tmp_path / "eager", batch={"size": 4}))
    compiled = spec_of(folder, COMPILED, tmp_path / "out", batch={"size": 4})
    counters.clear()
    job_here(compiled)
    assert counters["stats"]["unique_graphs"] == 1  # for all lengths, and a last batch of other rows
    np.testing.assert_allclose(vectors_of(tmp_path / "out"), vectors_of(tmp_path / "eager"), atol=1e-4)

    plan = make_plan(compiled)
    assert (plan.choice.compiled, plan.identity["engine"]) == (True, {"name": "torch", "compile": True})
    with pytest.raises(SpecError, match=r"differs in engine.compile \(there: True, now: None\)"):
        make_plan(spec_of(folder, "torch", tmp_path / "out"))
    (part,) = (tmp_path / "out").glob("part-*")
    before = pq.read_table(part)
    part.unlink()
    counters.clear()
    job_here(compiled)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert pq.read_table(part).equals(before)


def test_one_code_runs_batches_of_all_shapes_but_single_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def traced(graph: Any, inputs: Any) -> Any:
        """A compiler that keeps the graph, and counts its calls."""
        ran.append(0)
        return lambda *tensors: ran.append(1) or graph(*tensors)

    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options, **more: made(call, backend=traced, **more))
    folder = tiny_bert_encoder(tmp_path / "model", num_hidden_layers=1)
    model = AutoModel.from_pretrained(folder).eval()
    compiled = Compiled(model, folder)
    with torch.inference_mode():
        for shape, in_code in (
            ((2, 9), True),
            ((8, 64), True),
            ((31, 2), True),
            ((1, 9), False),
            ((7, 1), False),
        ):
            ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 90
            found = compiled(input_ids=ids)
            before = len(ran)
            assert torch.allclose(compiled(input_ids=ids)[0], found[0])
            assert torch.allclose(model(input_ids=ids)[0], found[0], atol=1e-4)
            assert len(ran) - before == in_code
    assert ran.count(0) == 1


def test_whether_to_compile_is_resolved_once(tmp_path: Path, texts: list[str]) -> None:
    folder = tiny_bert_encoder(tmp_path / "model", num_hidden_layers=1)
    job_here(spec_of(folder, "torch", tmp_path / "out"))
    for engine in ("torch", {"name": "torch", "compile": "auto"}, {"name": "torch", "compile": False}):
        plan = make_plan(spec_of(folder, engine, tmp_path / "out"))
        assert (plan.choice.compiled, plan.todo) == (False, [])
    with pytest.raises(SpecError, match=r"differs in engine.compile \(there: None, now: True\)"):
        make_plan(spec_of(folder, COMPILED, tmp_path / "out"))


def test_what_cannot_be_compiled_is_refused(
    tmp_path: Path, faults_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bert_encoder(tmp_path / "model", num_hidden_layers=1)
    (fault,) = faults_of(tiny_t5(tmp_path / "t5"), COMPILED, task="summarization")
    assert fault.startswith("engine.compile: task summarization needs `generate` of transformers")
    (fault,) = faults_of(folder, COMPILED, task="feature-extraction", params={"attentions": True})
    assert (
        "needs the PyTorch module of the model, and only the outputs of a model are compiled; leave it out"
        in fault
    )
    (fault,) = faults_of(quantised_checkpoint("int8", folder, tmp_path / "int8"), COMPILED)
    assert "are quantised; leave it out" in fault
    with pytest.raises(
        SpecError, match="compile is for a model on one device, with weights that are not quantised"
    ):
        spec_of(folder, {**COMPILED, "quantization": "int8"}, tmp_path / "out")
    with pytest.raises(SpecError, match=r"engine\.compile"):
        spec_of(folder, {"name": "onnx", "compile": True}, tmp_path / "out")

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda name: str(tmp_path))
    (fault,) = faults_of(folder, COMPILED)
    assert fault.startswith(
        "engine.compile needs the C++ compiler no-such-compiler and the headers of Python"
    )
    assert "install them (apt-get install g++ python3-dev), or leave it out" in fault
    spec = spec_of(folder, COMPILED, tmp_path / "out")
    with pytest.raises(
        WorkerError, match="engine torch of this job needs the C\\+\\+ compiler no-such-compiler"
    ):
        Runner(RunnerConfig.of(spec, pin(spec.model))).apply(
            RuntimeChoice(4, "float32", "cpu", compiled=True)
        )


class Means(torch.nn.Module):
    """A model that reads images."""

    class config:
        """The model's config."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        """Returns float32 [batch]."""
        return (pixel_values.mean((1, 2, 3)),)


def test_images_have_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, options, **more: made(call, backend="eager", **more))
    compiled = Compiled(Means(), "folder")
    for rows in (2, 1, 9):
        assert compiled(pixel_values=torch.ones(rows, 3, 8, 5))[0].tolist() == [1] * rows
    with pytest.raises(
        WorkerError, match=r"several sizes, .*\[3, 8, 5\]} and .*\[3, 5, 8\]}, and the code holds for one"
    ):
        compiled(pixel_values=torch.ones(2, 3, 5, 8))


class Doubling(torch.nn.Module):
    """A model whose control flow depends on its values, which no compiler can follow."""

    class config:
        max_position_embeddings = 64

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        """Returns float32 [batch, width]."""
        return (input_ids.float() * (2 if input_ids.sum() > 0 else 3) * attention_mask,)


def test_a_model_that_does_not_compile_and_code_that_differs_end_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(
        WorkerError, match=r"model 'folder' cannot be compiled: .*; set engine\.compile=false"
    ):
        Compiled(Doubling(), "folder")(input_ids=rows)
    made = torch.compile

    def wrong(call: Any, **_: Any) -> Any:
        return made(lambda **inputs: (call(**inputs)[0] * 1.01,), backend="eager", dynamic=True)

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(WorkerError, match=r"gives other results \(a relative difference of 0\.01\)"):
        Compiled(Doubling(), "folder")(input_ids=rows)


def test_threads_of_the_spec(tmp_path: Path, faults_of: Any) -> None:
    folder = tiny_bert_encoder(tmp_path / "model", num_hidden_layers=1)
    spec = spec_of(folder, {"name": "torch", "threads": 3}, tmp_path / "out")
    assert Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9).load().parallel == 3
    (fault,) = faults_of(folder, {"name": "torch", "threads": 3}, workers={"cpus": 2})
    assert (
        fault == "engine.threads is 3, and workers.cpus 2; set engine.threads=2 or fewer, or workers.cpus=3"
    )
    assert make_plan(spec).identity["engine"] == {"name": "torch"}
    assert lay_out(WorkersSpec(), [Node(2, 0)], threads=2).cpus == 1.5
    with pytest.raises(SpecError, match=r"engine.threads is 4, and a worker has 1.5 CPUs on this cluster"):
        lay_out(WorkersSpec(), [Node(2, 0)], threads=4)
    assert lay_out(WorkersSpec(), [Node(2, 1)], threads=4).gpus == 1
