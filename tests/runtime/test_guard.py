"""The guard: the choice of rows, and what becomes of a model whose precision does harm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hfbatch import JobSpec
from hfbatch.errors import WorkerError
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import engine_faults
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import sample, verdict
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.prepare import POSITION
from hfbatch.runtime.runner import Runner
from hfbatch.runtime.variants import Variant
from hfbatch.spec.engines import GuardSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.agreement import Comparison
from hfbatch.tasks.generation.likelihood import log_probs_after
from hfbatch.tasks.multimodal.embedding import Embedding
from tests.models.quantised import quantised_checkpoint
from tests.models.text import tiny_llama, tiny_mbart, tiny_t5

TEXTS = [f"{'a longer text about the house ' * (k % 5)}number {k}" for k in range(60)]


def proposed(folder: str, task: str = "embedding", guard: Any = "auto", **changes: Any) -> tuple[Runner, Any]:
    """The runner and the choice for rows of texts, in bfloat16 unless changed."""
    engine = {"name": "torch", "guard": guard, **changes.pop("engine", {})}
    model = {"name": folder, "dtype": "bfloat16", **changes.pop("model", {})}
    values = {"task": task, "model": model, "engine": engine, "input": "in", "output": "out", **changes}
    spec = JobSpec.build(values)
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9)
    columns = {"text": pa.array(TEXTS)}
    places = pa.table({"file": ["a"] * len(TEXTS), "row": pa.array(range(len(TEXTS)), pa.int64())})
    features = runner.preprocess(columns, places).features
    return runner, runner.propose(features, len(TEXTS), columns)


@pytest.fixture(scope="module")
def fragile(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with an offset in its embeddings that its first normalisation removes, and that bfloat16 rounds to."""
    folder = tmp_path_factory.mktemp("fragile")
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 300
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(encoder) / name).read_bytes())
    return str(folder)


def test_a_healthy_model_passes(encoder: str) -> None:
    runner, choice = proposed(encoder)
    assert (choice.dtype, runner.engine.dtype, choice.guard["status"]) == ("bfloat16", "bfloat16", "passed")
    assert choice.guard["measures"]["cosine_mean"] > 0.995
    assert sum(choice.guard["differences"]) == choice.guard["rows"] >= 8
    assert choice.guard["summary"].startswith("torch (bfloat16) agrees with float32 on ")


def test_nothing_is_compared_in_float32_or_if_the_guard_is_skipped(encoder: str) -> None:
    assert proposed(encoder, model={"dtype": "float32"})[1].guard is None
    assert proposed(encoder, guard="skip")[1].guard is None


def test_a_fragile_model_ends_the_job_before_work(fragile: str) -> None:
    with pytest.raises(
        WorkerError, match=r"differs too much .* cosine_min must be at least 0.98.*model.dtype=float32"
    ):
        proposed(fragile)


def test_a_dtype_that_the_spec_leaves_open_falls_back_to_float32(
    fragile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("native_dtype", "fastest_dtype"):
        chosen = ("cpu", "bfloat16") if name == "native_dtype" else "bfloat16"
        monkeypatch.setattr(f"hfbatch.runtime.runner.{name}", lambda gpus=True, chosen=chosen: chosen)
    loaded: list[Variant] = []
    build = Runner._build
    monkeypatch.setattr(
        Runner, "_build", lambda runner, variant: loaded.append(variant) or build(runner, variant)
    )
    runner, choice = proposed(fragile, model={"dtype": "auto"})
    assert [variant.dtype for variant in loaded] == ["bfloat16", "float32"]  # not float32 twice
    assert (choice.dtype, runner.engine.dtype, choice.guard["status"]) == ("float32", "float32", "failed")


def test_limits_of_the_spec_replace_those_of_the_task(encoder: str, fragile: str) -> None:
    loose = {"limits": {"cosine_mean": -1, "cosine_min": -1, "spread_change": 9}}
    assert proposed(fragile, guard=loose)[1].guard["status"] == "passed"
    with pytest.raises(WorkerError, match=r"top10_overlap must be at least 1\.01"):
        proposed(encoder, guard={"limits": {"top10_overlap": 1.01}})


def test_a_limit_that_too_few_rows_leave_unmeasured_does_not_hold(encoder: str) -> None:
    with pytest.raises(WorkerError, match=r"top10_overlap must be at least 0\.5, and was not measured on 8"):
        proposed(encoder, guard={"rows": 8, "limits": {"top10_overlap": 0.5}})


def test_rows_that_fail_in_float32_too_are_no_fault_of_the_precision(encoder: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += float("nan")
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(encoder) / name).read_bytes())
    judged = proposed(str(tmp_path))[1].guard
    assert (judged["status"], judged["reason"]) == ("unguarded", "none of 60 rows has a result in float32")


def test_rows_that_fail_after_the_model_are_faults_of_the_precision(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a task finds NaN in what it has made of the outputs."""
    postprocess, dtypes = Embedding.postprocess, []

    class Watched(Predictor):
        def __init__(self, task: Any, engine: Any, *rest: Any) -> None:
            super().__init__(task, engine, *rest)
            dtypes.append(engine.dtype)

    def refuse(task: Embedding, outputs: pa.Table, columns: Any) -> list[pa.Array]:
        if dtypes[-1] == "bfloat16" and TEXTS[3] in columns["text"].to_pylist():
            raise ValueError("the vector is NaN")
        return postprocess(task, outputs, columns)

    monkeypatch.setattr("hfbatch.runtime.guard.Predictor", Watched)
    monkeypatch.setattr(Embedding, "postprocess", refuse)
    with pytest.raises(WorkerError, match="1 of 60 rows fail, which do not in float32: the vector is NaN"):
        proposed(encoder)


def test_a_limit_of_an_unknown_measure_and_a_guard_without_a_measure_are_faults(encoder: str) -> None:
    def faults(task: str, guard: Any) -> list[str]:
        values = {
            "task": task,
            "model": encoder,
            "engine": {"name": "torch", "guard": guard},
            "input": "i",
            "output": "o",
        }
        spec = JobSpec.build(values)
        return engine_faults(spec.engine, "auto", RunnerConfig.of(spec, pin(spec.model)).build_task())

    assert faults("embedding", "required") == []
    assert "has no measure 'cosine' (it has: cosine_mean" in faults("embedding", {"limits": {"cosine": 1}})[0]
    assert "task text-to-audio has no measure" in faults("text-to-audio", "required")[0]


def test_rows_without_an_item_are_not_compared(encoder: str, tmp_path: Path) -> None:
    """A tagger whose labels are all ignored: with nothing found, there is no agreement to require."""
    AutoModelForTokenClassification.from_pretrained(encoder, num_labels=2).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(encoder) / name).read_bytes())
    params = {"ignore_labels": ["LABEL_0", "LABEL_1"]}
    judged = proposed(str(tmp_path), "token-classification", params=params)[1].guard
    assert (judged["status"], judged["measures"]) == ("unguarded", {})
    assert (
        "was not compared with float32: none of 60 rows has an item, in either precision" in judged["summary"]
    )
    with pytest.raises(
        WorkerError, match=r"has an item.* Set model.dtype=float32, or leave guard: required out"
    ):
        proposed(str(tmp_path), "token-classification", "required", params=params)


def test_measures_without_a_limit_judge_nothing() -> None:
    task = task_class("image-to-text").__new__(task_class("image-to-text"))
    found = Comparison(np.ones(9), {"similarity_mean": 0.1, "equal": 0.0})
    free = verdict(task, found, "torch (bfloat16)", 9, GuardSpec(), 1.0)
    assert free.status == "unguarded"
    assert "nothing is judged unless engine.guard.limits sets a limit: similarity_mean 0.1" in free.summary
    limited = GuardSpec(limits={"similarity_mean": 0.5})
    assert verdict(task, found, "torch (bfloat16)", 9, limited, 1.0).status == "failed"


def test_a_model_without_a_reference_is_reported_and_refused_if_the_guard_is_required(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.runtime.variants.free_memory", lambda: 1000)
    judged = proposed(encoder)[1].guard
    assert judged["status"] == "unguarded"
    assert "was not compared with float32: in float32 it needs" in judged["summary"]
    with pytest.raises(WorkerError, match="was not compared with float32"):
        proposed(encoder, guard="required")


def test_labels_are_compared(encoder: str, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(encoder) / name).read_bytes())
    guard = {"limits": {"agreement": 0}}
    judged = proposed(str(tmp_path), "text-classification", guard)[1].guard
    assert judged["status"] == "passed"
    assert set(judged["measures"]) == {"agreement", "score_change_mean", "score_change_max"}
    assert judged["measures"]["score_change_max"] < 0.05


def test_weights_that_are_quantised_already_are_reported(tmp_path: Path) -> None:
    """In float32 too, which is not the precision of the weights."""
    folder = quantised_checkpoint("int8", tiny_llama(tmp_path / "plain"), tmp_path / "int8")
    given = {"model": {"dtype": "float32"}, "params": {"max_new_tokens": 4, "do_sample": False}}
    judged = proposed(folder, "text-generation", **given)[1].guard
    assert judged["status"] == "unguarded"
    assert "its weights are quantised already" in judged["summary"]
    spec = JobSpec.build(
        {
            "task": "text-generation",
            "model": folder,
            "engine": {"guard": "required"},
            "input": "i",
            "output": "o",
        }
    )
    (fault,) = engine_faults(spec.engine, "float32", RunnerConfig.of(spec, pin(spec.model)).build_task())
    assert "there is nothing to compare them with" in fault


@pytest.mark.parametrize("engine", ["torch", "continuous"])
def test_generated_tokens_are_compared(tmp_path: Path, engine: str) -> None:
    params = {"max_new_tokens": 40, "do_sample": False}
    _, choice = proposed(tiny_llama(tmp_path), "text-generation", engine={"name": engine}, params=params)
    assert choice.guard["status"] == "passed", choice.guard
    assert 0 < choice.guard["measures"]["log_prob_change_mean"] < 0.2
    assert choice.guard["measures"]["next_token_agreement"] > 0.9


def test_the_same_model_gives_the_same_probabilities(tmp_path: Path) -> None:
    """Also of an encoder-decoder model, and of the second text of a row, which is not compared."""
    for folder, task in (
        (tiny_t5(tmp_path / "t5"), "text2text-generation"),
        (tiny_llama(tmp_path / "llama"), "text-generation"),
    ):
        params = {"max_new_tokens": 12, "num_beams": 2, "num_return_sequences": 2}
        spec = JobSpec.build(
            {"task": task, "model": folder, "params": params, "input": "in", "output": "out"}
        )
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9)
        columns = {"text": pa.array(TEXTS[:3])}
        places = pa.table({"file": ["a"] * 3, "row": pa.array(range(3), pa.int64())})
        features = runner.preprocess(columns, places).features.drop_columns([POSITION])
        model = runner.load(Variant("torch", "float32")).model
        found = runner.task.compare_models(model, model, features)
        assert found.measures == {"log_prob_change_mean": 0, "next_token_agreement": 1}
        other = copy.deepcopy(model)
        other.get_output_embeddings().weight.data.mul_(3)
        assert runner.task.compare_models(model, other, features).measures["log_prob_change_mean"] > 0


def test_the_tokens_that_a_model_generates_are_its_most_probable_ones(tmp_path: Path) -> None:
    """Except for the first token of mBART, the forced language."""
    languages = {"src_lang": "en_XX", "tgt_lang": "de_DE"}
    for folder, task, params in (
        (tiny_mbart(tmp_path / "mbart"), "translation", languages),
        (tiny_t5(tmp_path / "t5"), "text2text-generation", {}),
        (tiny_llama(tmp_path / "llama"), "text-generation", {}),
    ):
        spec = JobSpec.build(
            {"task": task, "model": folder, "params": {"max_new_tokens": 12, "num_beams": 1, **params}, "input": "i",
             "output": "o"}
        )  # fmt: skip
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9)
        model, decoder = runner.load(Variant("torch", "float32")).model, runner.task.decoder
        batch = {
            "input_ids": torch.tensor([[5, 6, 7, 8]]),
            "attention_mask": torch.ones(1, 4, dtype=torch.int64),
        }
        tokens = decoder(model, batch)["tokens"].long()
        start = decoder.config.decoder_start_token_id
        found = log_probs_after(start, model, batch, tokens).argmax(1)
        assert found[1:].tolist() == tokens[0, 1:].tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(1, 300), st.integers(0, 3))
@settings(max_examples=50)
def test_the_sample_holds_different_rows_of_all_lengths(lengths: list[int], count: int, seed: int) -> None:
    rows = sample(np.array(lengths), count, seed)
    assert len(set(rows.tolist())) == len(rows) == min(count, len(lengths))
    if count >= 10 * len(set(lengths)):
        assert {lengths[row] for row in rows} <= set(lengths)
    assert np.array_equal(rows, sample(np.array(lengths), count, seed))
