"""The guard: measures of agreement, the choice of rows, and what becomes of a model whose precision does harm."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification

from hfbatch import JobSpec
from hfbatch.errors import WorkerError
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import engine_faults
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.guard import sample
from hfbatch.runtime.prepare import POSITION
from hfbatch.runtime.runner import Runner
from hfbatch.runtime.variants import Variant
from hfbatch.tasks import TASKS, task_class
from hfbatch.tasks.agreement import Best, Items, Limit, Pixels, Ranking, Texts, Vectors
from hfbatch.tasks.generation.likelihood import log_probs_after
from hfbatch.tasks.vision.masks import box_overlap, encode_mask, mask_overlap
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
    runner, choice = proposed(fragile, model={"dtype": "auto"})
    assert (choice.dtype, runner.engine.dtype, choice.guard["status"]) == ("float32", "float32", "failed")


def test_limits_of_the_spec_replace_those_of_the_task(encoder: str, fragile: str) -> None:
    loose = {"limits": {"cosine_mean": -1, "cosine_min": -1}}
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
    verdict = proposed(str(tmp_path))[1].guard
    assert (verdict["status"], verdict["reason"]) == ("unguarded", "none of 60 rows has a result in float32")


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


def test_a_model_without_a_reference_is_reported_and_refused_if_the_guard_is_required(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.runtime.variants.free_memory", lambda: 1000)
    verdict = proposed(encoder)[1].guard
    assert verdict["status"] == "unguarded"
    assert "was not compared with float32: in float32 it needs" in verdict["summary"]
    with pytest.raises(WorkerError, match="was not compared with float32"):
        proposed(encoder, guard="required")


def test_labels_are_compared(encoder: str, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(encoder) / name).read_bytes())
    guard = {"limits": {"agreement": 0}}
    verdict = proposed(str(tmp_path), "text-classification", guard)[1].guard
    assert verdict["status"] == "passed"
    assert set(verdict["measures"]) == {"agreement", "score_change_mean", "score_change_max"}
    assert verdict["measures"]["score_change_max"] < 0.05


def test_weights_that_are_quantised_already_are_reported(tmp_path: Path) -> None:
    """In float32 too, which is not the precision of the weights."""
    folder = quantised_checkpoint("int8", tiny_llama(tmp_path / "plain"), tmp_path / "int8")
    given = {"model": {"dtype": "float32"}, "params": {"max_new_tokens": 4, "do_sample": False}}
    verdict = proposed(folder, "text-generation", **given)[1].guard
    assert verdict["status"] == "unguarded"
    assert "its weights are quantised already" in verdict["summary"]
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


def columns(**values: list[Any]) -> dict[str, pa.Array]:
    return {name: pa.array(column) for name, column in values.items()}


def test_vectors_of_tokens_count_as_one_and_a_null_vector_equals_itself() -> None:
    one = columns(v=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]]])
    found = Vectors("v").compare(one, columns(v=[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0]]]))
    assert found.measures == {"cosine_mean": pytest.approx(0.75), "cosine_min": pytest.approx(0.5)}
    assert Vectors("v").compare(one, columns(v=[[[1.0]], [[1.0, 1.0]]])).rows.tolist() == [0, 0]


def test_neighbours_are_compared_if_there_are_enough_rows() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    same = Vectors("v").compare(columns(v=vectors.tolist()), columns(v=(2 * vectors).tolist()))
    assert same.measures["top10_overlap"] == 1
    other = Vectors("v").compare(columns(v=vectors.tolist()), columns(v=vectors[::-1].tolist()))
    assert other.measures["top10_overlap"] < 0.4


def test_the_best_answer_is_compared() -> None:
    one = columns(label=[["a", "b"], ["a", "b"], []], score=[[0.9, 0.1], [0.6, 0.4], []])
    other = columns(label=[["a", "b"], ["b", "a"], []], score=[[0.8, 0.2], [0.7, 0.3], []])
    found = Best("label").compare(one, other)
    assert found.rows == pytest.approx([0.9, 0, 1])
    assert found.measures == {
        "agreement": pytest.approx(2 / 3), "score_change_mean": pytest.approx(0.2 / 3),
        "score_change_max": pytest.approx(0.1),
    }  # fmt: skip
    structs = columns(answers=[[{"answer": "x", "start": 3, "score": 0.5}]])
    moved = columns(answers=[[{"answer": "x", "start": 4, "score": 0.5}]])
    assert Best("answers").compare(structs, structs).measures["agreement"] == 1
    assert Best("answers").compare(structs, moved).measures["agreement"] == 0


def test_entities_boxes_and_masks_are_matched() -> None:
    one = columns(
        e=[[{"entity": "PER", "start": 0, "score": 0.9}, {"entity": "LOC", "start": 5, "score": 0.9}], []]
    )
    other = columns(e=[[{"entity": "LOC", "start": 5, "score": 0.7}], []])
    found = Items("e").compare(one, other)
    assert (found.measures["f1"], found.rows.tolist()) == (pytest.approx(2 / 3), [pytest.approx(2 / 3), 1])
    box = {"xmin": 0, "ymin": 0, "xmax": 10, "ymax": 10}
    near, far = {**box, "xmax": 9}, {**box, "xmin": 8, "xmax": 18}
    for place, same in ((near, 1), (far, 0)):
        found = Items("o", "box", box_overlap).compare(
            columns(o=[[{"label": "cat", "box": box}]]), columns(o=[[{"label": "cat", "box": place}]])
        )
        assert found.measures["f1"] == same
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    for form in ("png", "rle"):
        assert mask_overlap(encode_mask(mask, form), encode_mask(mask | mask.T, form)) == pytest.approx(
            8 / 12
        )


def test_answers_that_are_numbers_are_compared() -> None:
    asked = {"question": "late", "noul": 0.9, "choice": None, "score": None}
    agreement = task_class("decision").agreement
    for change, same in (({}, 1), ({"noul": 0.88}, 1), ({"noul": 0.1}, 0), ({"score": 2.0}, 0)):
        found = agreement.compare(columns(answers=[[asked]]), columns(answers=[[{**asked, **change}]]))
        assert found.measures["f1"] == same


def test_texts_rankings_and_pixels_are_compared() -> None:
    found = Texts("t").compare(columns(t=["same", "abcd"]), columns(t=["same", "abxy"]))
    assert found.measures == {"similarity_mean": 0.75, "equal": 0.5}
    ranks = Ranking("s").compare(columns(s=[[1.0, 2.0], []]), columns(s=[[2.0, 1.0], []]))
    assert ranks.measures["agreement"] == 0.5
    alone = Ranking("s").compare(columns(s=[[0.9], [8.0], []]), columns(s=[[0.1], [6.0], []]))
    assert alone.measures == {"agreement": 1, "cosine_mean": 1, "score_change_mean": pytest.approx(0.525)}
    depth = Pixels("d").compare(columns(d=[[[0.0, 1.0], [2.0, 4.0]]]), columns(d=[[[0.0, 1.0], [2.0, 3.0]]]))
    assert depth.measures["pixel_change_mean"] == pytest.approx(0.25 / 4)
    black = Pixels("d").compare(
        columns(d=[[[0.0, 0.0]], [[0.0, 8.0]]]), columns(d=[[[0.0, 0.1]], [[0.0, 8.0]]])
    )
    assert black.measures["pixel_change_mean"] == pytest.approx(0.05 / 8 / 2)


@pytest.mark.parametrize("letters", ["abcdefgh   ", "".join(map(chr, range(0x4E00, 0x5000)))])
def test_long_texts_are_compared_in_a_moment(letters: str) -> None:
    random = np.random.default_rng(0)
    text = "".join(random.choice(list(letters), 6000))
    other = "".join(random.choice(list(letters)) if random.random() < 0.02 else one for one in text)
    begun = time.process_time()
    found = Texts("t").compare(columns(t=[text]), columns(t=[other])).measures["similarity_mean"]
    assert time.process_time() - begun < 1
    assert 0.85 < found < 0.99


def test_limits_hold_for_numbers_only() -> None:
    assert Limit(0.5).holds(0.5)
    assert not Limit(0.5).holds(float("nan"))
    assert not Limit(0.5, most=True).holds(0.6)
    assert Limit().holds(0.0)


def test_each_task_has_a_measure_or_is_known_to_have_none() -> None:
    """Sound and matched keypoints vary continuously, and no limit is known for them."""
    without = {name for name in TASKS if task_class(name).agreement is None}
    assert without == {"text-to-audio", "keypoint-matching"}
