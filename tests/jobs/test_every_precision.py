"""Every task in every lowered precision: the rows that float32 predicts are predicted, and the comparison with float32 sees
what the precision changes; or the plan says why the model cannot be quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch import JobSpec
from hfbatch.data.finite import non_finite
from hfbatch.data.formats.columns import arrays_of
from hfbatch.engines import ENGINES
from hfbatch.engines.openvino import computes_in_bfloat16
from hfbatch.engines.quantization import linear_layers, skeleton_of
from hfbatch.errors import SpecError
from hfbatch.output.rejects import unreadable
from hfbatch.predict.bind import bind
from hfbatch.predict.preview import first_rows
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import Verdict, compare
from hfbatch.runtime.runner import Runner
from hfbatch.runtime.variants import REFERENCE, Variant
from hfbatch.spec.engines import GuardSpec
from tests.cases.every import CASES, EXPORTABLE
from tests.jobs.here import job_here
from tests.jobs.test_every_task import EXPORTED, write_rows
from tests.jobs.tools import make_spec, read_output, read_rejects
from tests.tasks.test_quantized import quantised

pytestmark = pytest.mark.matrix
LOWERED = [
    Variant(name, dtype, quantization)
    for name, kind in ENGINES.items()
    for dtype, quantization in [("bfloat16", "none"), *(("float32", one) for one in kind.quantizations)]
    if dtype in kind.dtypes and not kind.apart
]
UNDECIDED = {
    "automatic-speech-recognition", "decision", "document-question-answering", "fill-mask", "image-to-text", "mask-generation",
    "question-answering", "summarization", "text-ranking", "text2text-generation", "translation",
    "zero-shot-audio-classification", "zero-shot-object-detection",
}  # fmt: skip
"""Tasks whose models in tests/cases, which are random, are about to give another answer: rounding changes some."""
REPORTED = ("id", "hfbatch_stage", "hfbatch_error", "hfbatch_message")


@dataclass
class Exact:
    """A task's model and rows, and what a job in float32 made of them."""

    name: str
    folder: Path
    outputs: pa.Table
    rejects: list[dict[str, Any]]

    def spec(self, variant: Variant) -> JobSpec:
        """A job in another precision, which nothing stops."""
        return spec_of(self.name, self.folder, variant)


def spec_of(name: str, folder: Path, variant: Variant) -> JobSpec:
    """A job over the case's rows, which is not compared with float32."""
    engine = {"name": variant.engine, "quantization": variant.quantization, "guard": "skip"}
    out = folder / f"out-{variant.engine}-{variant.dtype}-{variant.quantization}"
    return make_spec(
        name, str(folder / "model"), folder / "in", out, engine=engine, model={"dtype": variant.dtype},
        params=dict(CASES[name].params), output={"keep": ["id"]}, rejects={"max_fraction": 0.2},
    )  # fmt: skip


def results(spec: JobSpec) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Runs a job. :returns: its predictions and its rejects."""
    done = job_here(spec)
    assert done.exit_code == 0, done.message
    rejects = [{name: row[name] for name in REPORTED} for row in read_rejects(spec.output.path)]
    return read_output(spec.output.path), rejects


@pytest.fixture(scope="module")
def exact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exact:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    CASES[name].build(folder / "model")
    write_rows(CASES[name], folder / "in")
    return Exact(name, folder, *results(spec_of(name, folder, REFERENCE)))


class Compared:
    """The rows of a job, whose model can be compared with that in float32."""

    def __init__(self, spec: JobSpec) -> None:
        faults: list[str] = []
        bound = bind(spec, None, faults)
        assert bound is not None, faults
        self.runner = Runner(RunnerConfig.of(bound.spec, bound.model, bound.source.root_url), 1e-9)
        self.runner.load()
        rows = first_rows(bound, 64)
        self.columns = arrays_of(rows.table, bound.inputs)
        self.features = self.runner.preprocess(self.columns, rows.places, unreadable(rows)).features

    def verdict(self) -> Verdict:
        """Judges by the default limits."""
        runner, reference = self.runner, partial(self.runner._build, REFERENCE)
        assert runner.engine is not None
        rows = self.features.num_rows * 1000
        return compare(
            runner.task, reference, runner.engine, "it", self.features, self.columns, GuardSpec(), rows
        )


def check_verdict(found: Verdict, runner: Runner) -> None:
    """Whether there are the task's measures, or the reason why there are none."""
    agreement = runner.task.own_agreement
    if agreement is None:
        assert (found.status, found.measures) == ("unguarded", {})
        assert "has no measure of agreement" in found.reason
        return
    assert found.measures
    assert set(found.measures) <= set(agreement.limits)
    assert np.isfinite([*found.measures.values()]).all()
    assert sum(found.differences) == found.rows >= 8
    limited = any(limit.value is not None for limit in agreement.limits.values())
    assert (found.status in ("passed", "failed")) == limited


@pytest.mark.parametrize("variant", LOWERED, ids=str)
@pytest.mark.parametrize("exact", CASES, indirect=True, scope="module")
def test_a_lowered_precision_keeps_every_row_and_is_compared(
    exact: Exact, variant: Variant, record_property: Callable[[str, object], None]
) -> None:
    spec = exact.spec(variant)
    if variant.engine in EXPORTED and exact.name not in EXPORTABLE:
        with pytest.raises(
            SpecError, match=rf"engine {variant.engine} cannot run task {exact.name}, which needs"
        ):
            job_here(spec)
        return
    if variant.engine == "continuous" and exact.name != "text-generation":
        with pytest.raises(SpecError, match=rf"engine continuous cannot run task {exact.name}, which needs"):
            job_here(spec)
        return
    if variant == Variant("openvino", "bfloat16") and not computes_in_bfloat16():
        pytest.skip("OpenVINO does not compute in bfloat16 on this CPU")
    outputs, rejects = results(spec)
    assert outputs.schema == exact.outputs.schema
    assert outputs["id"].to_pylist() == exact.outputs["id"].to_pylist()
    assert rejects == exact.rejects
    assert [name for name in outputs.column_names if len(non_finite(outputs[name]))] == []
    made = Compared(spec)
    if variant.engine in ("torch", "continuous") and variant.quantization != "none":
        model = made.runner.engine.model
        plain = skeleton_of(made.runner.task.config, made.runner.task.auto_class)
        assert quantised(model) == set(linear_layers(plain, variant.quantization))
    found = made.verdict()
    record_property("verdict", f"{found.status}: {found.summary}")  # for `--junitxml`
    check_verdict(found, made.runner)
    if exact.name not in UNDECIDED and (
        variant.dtype == "bfloat16" or variant.quantization == "int8_weight_only"
    ):
        assert found.status != "failed", found.summary


@pytest.mark.parametrize("exact", CASES, indirect=True, scope="module")
def test_the_comparison_sees_no_change_and_a_ruined_model(exact: Exact) -> None:
    """Float32 beside itself passes with the best values; a model with as much noise as weights fails."""
    made = Compared(exact.spec(REFERENCE))
    same = made.verdict()
    check_verdict(same, made.runner)
    for name, value in same.measures.items():
        assert value == pytest.approx(
            0 if "change" in name else same.measures["items"] if name == "items" else 1
        )
    assert same.status != "failed"
    assert made.runner.engine is not None
    ruin(made.runner.engine.model)
    ruined = made.verdict()
    if same.measures:
        assert ruined.measures != same.measures
    assert ruined.status == ("failed" if same.status == "passed" else "unguarded"), ruined.summary


def ruin(model: torch.nn.Module) -> None:
    """Adds noise to every matrix of weights."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += torch.randn(weight.shape, generator=random) * weight.std()
