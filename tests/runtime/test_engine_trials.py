"""`engine: auto`: what is tried, and what is chosen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hfbatch import JobSpec
from hfbatch.engines import ENGINES, EngineKind
from hfbatch.engines.base import Capability, Forward
from hfbatch.engines.torch import TorchEngine
from hfbatch.errors import WorkerError
from hfbatch.hub.models import pin
from hfbatch.predict.identity import job_identity
from hfbatch.runtime import engine_trials, variants
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.runtime.variants import Variant

TEXTS = [f"{'a longer text about the house ' * (k % 5)}number {k}" for k in range(40)]


def proposed(folder: str, rows: int, **engine: Any) -> tuple[Runner, RuntimeChoice]:
    """The runner and the choice for a job of so many rows."""
    values = {
        "task": "embedding",
        "model": {"name": folder, "dtype": engine.pop("dtype", "auto")},
        "engine": {"name": "auto", **engine},
        "input": "i",
        "output": "o",
    }
    spec = JobSpec.build(values)
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9)
    columns = {"text": pa.array(TEXTS)}
    places = pa.table({"file": ["a"] * len(TEXTS), "row": pa.array(range(len(TEXTS)), pa.int64())})
    return runner, runner.propose(runner.preprocess(columns, places).features, rows, columns)


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Rows per second of each variant, in place of measurements; each engine is loaded and compared all the same."""
    rates: dict[str, float] = {}
    monkeypatch.setattr(
        engine_trials.EngineSearch, "_speed",
        lambda search, engine, rows: rates.get(f"{engine.name} {engine.dtype}", 1.0),
    )  # fmt: skip
    monkeypatch.setattr(variants, "fastest_dtype", lambda gpus: "bfloat16")
    monkeypatch.setattr("hfbatch.runtime.runner.native_dtype", lambda gpus: ("cpu", "bfloat16"))
    monkeypatch.setattr("hfbatch.runtime.runner.fastest_dtype", lambda gpus: "float32")
    return rates


def leave_out(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Engines are not among the candidates. ENGINES itself stays: a deleted entry would come back as the last one."""
    monkeypatch.setattr(
        variants, "ENGINES", {name: kind for name, kind in ENGINES.items() if name not in names}
    )


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out(monkeypatch, "openvino", "onnx")


def test_a_short_job_tries_nothing(encoder: str) -> None:
    runner, choice = proposed(encoder, len(TEXTS))
    assert (choice.engine, choice.dtype, choice.trials) == ("torch", runner.engine.dtype, None)


@pytest.mark.usefixtures("torch_alone")
def test_the_fastest_that_agrees_with_float32_is_chosen(encoder: str, speeds: dict[str, float]) -> None:
    speeds["torch bfloat16"] = 1.2
    runner, choice = proposed(encoder, 10_000)
    assert (choice.engine, choice.dtype, runner.engine.dtype) == ("torch", "bfloat16", "bfloat16")
    assert choice.guard["status"] == "passed"
    assert [(one["variant"], one["rows_per_s"]) for one in choice.trials] == [
        ("torch (float32)", 1.0), ("torch (bfloat16)", 1.2)
    ]  # fmt: skip
    runner.apply(RuntimeChoice(**asdict(choice)))
    assert runner.engine.dtype == "bfloat16"


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize(
    ("speed", "limit", "note"), [(1.2, 1.01, "differs too much"), (1.04, 0.9, "not faster")]
)
def test_a_variant_that_differs_or_is_not_faster_is_out(
    encoder: str,
    speeds: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    speed: float,
    limit: float,
    note: str,
) -> None:
    """Each is loaded once, float32 too: it is a variant, and what the other one is compared with."""
    speeds["torch bfloat16"] = speed
    loaded, build = [], Runner._build
    monkeypatch.setattr(
        Runner, "_build", lambda runner, variant: loaded.append(variant.dtype) or build(runner, variant)
    )
    _, choice = proposed(encoder, 10_000, guard={"limits": {"cosine_mean": limit}})
    assert (choice.engine, choice.dtype, choice.guard) == ("torch", "float32", None)
    assert note in choice.trials[1]["note"]
    assert loaded == ["float32", "bfloat16"]


@pytest.mark.usefixtures("torch_alone")
def test_a_dtype_that_the_spec_names_is_kept(encoder: str, speeds: dict[str, float]) -> None:
    speeds["torch bfloat16"] = 2.0
    _, choice = proposed(encoder, 10_000, dtype="float32")
    assert (choice.dtype, [one["variant"] for one in choice.trials]) == ("float32", ["torch (float32)"])
    with pytest.raises(WorkerError, match=r"cosine_mean must be at least 1.01.*model.dtype=float32"):
        proposed(encoder, 10_000, dtype="bfloat16", guard={"limits": {"cosine_mean": 1.01}})


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize(("mode", "dtype"), [("auto", "bfloat16"), ("required", "float32")])
def test_what_has_no_reference_is_chosen_unless_a_comparison_is_required(
    encoder: str, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch, mode: str, dtype: str
) -> None:
    speeds["torch bfloat16"] = 2.0
    monkeypatch.setattr("hfbatch.runtime.runner.fastest_dtype", lambda gpus: "bfloat16")
    monkeypatch.setattr(variants, "free_memory", lambda: 1000)
    assert proposed(encoder, 10_000, guard=mode)[1].dtype == dtype


def test_another_engine_is_chosen_if_its_export_is_worth_it(
    encoder: str, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leave_out(monkeypatch, "openvino")  # one export is enough
    speeds["onnx float32"] = 2.0
    with monkeypatch.context() as patch:
        patch.setenv("HFBATCH_CACHE", str(tmp_path))  # nothing is exported yet
        _, choice = proposed(encoder, 200)
    notes = {one["variant"]: one["note"] for one in choice.trials}
    assert (choice.engine, notes["onnx (float32)"]) == (
        "torch",
        "not tried: the job is too short for an export",
    )
    runner, choice = proposed(encoder, 10_000, seconds=1e9)
    assert (choice.engine, choice.dtype, runner.engine.name) == ("onnx", "float32", "onnx")
    spec = JobSpec.build(
        {"task": "embedding", "model": encoder, "engine": "auto", "input": "i", "output": "o"}
    )
    again = Runner(RunnerConfig.of(spec, pin(spec.model), choice=choice), share=1e-9)
    assert (again.load().name, again.variant(choice)) == ("onnx", Variant("onnx", "float32"))


class ShortRowsEngine(TorchEngine):
    """Refuses rows of more than 20 tokens, as a graph can whose lengths are limited."""

    name = "short"

    def submit(self, batch: dict[str, np.ndarray], forward: Forward) -> Any:
        if batch["input_ids"].shape[1] > 20:
            raise ValueError("more than 20 tokens")
        return super().submit(batch, forward)


@pytest.mark.usefixtures("torch_alone")
def test_an_engine_that_fails_on_rows_is_out(
    encoder: str, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = EngineKind(f"{__name__}:ShortRowsEngine", frozenset({Capability.FORWARD}), dtypes=("float32",))
    monkeypatch.setitem(ENGINES, "short", kind)
    monkeypatch.setitem(variants.ENGINES, "short", kind)  # type: ignore[attr-defined]
    speeds["short float32"] = 9.0
    _, choice = proposed(encoder, 10_000)
    assert choice.engine == "torch"
    assert "rows fail, which do not in float32: more than 20 tokens" in choice.trials[-1]["note"]


@pytest.mark.usefixtures("torch_alone")
def test_no_trial_begins_when_time_is_up(
    encoder: str, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds["torch bfloat16"] = 2.0
    monkeypatch.setattr(engine_trials, "LONG_SHARE", 0.0)
    _, choice = proposed(encoder, 10_000, seconds=1e-9)
    assert choice.dtype == "float32"
    assert [one["note"] for one in choice.trials] == ["", "not tried: time was up"]


def test_a_rerun_may_give_the_trials_other_limits(encoder: str) -> None:
    found = []
    for engine in ({"name": "auto"}, {"name": "auto", "seconds": 60, "guard": "required"}):
        spec = JobSpec.build(
            {"task": "embedding", "model": encoder, "engine": engine, "input": "i", "output": "o"}
        )
        model = pin(spec.model)
        found.append(job_identity(spec, model, RunnerConfig.of(spec, model).build_task(), {}, []))
    assert found[0] == found[1]
