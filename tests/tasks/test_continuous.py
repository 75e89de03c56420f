"""Continuous batching gives every row what `generate` gives it alone, and refuses what it cannot do."""

from __future__ import annotations

import json
from functools import cache
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hfbatch.engines.base import EngineConfig, Request
from hfbatch.engines.continuous import ContinuousEngine
from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.predict import plan
from hfbatch.predict.identity import job_identity
from hfbatch.predict.plan import make_plan
from hfbatch.predict.verify import verify_output
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.prepare import POSITION
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec, ModelSpec
from tests.jobs.here import job_here
from tests.models.text import CORPUS, bytes_tokenizer, save, tiny_bert, tiny_llama

TEXTS = [CORPUS[k][: 3 + 3 * k] for k in range(14)]
LENGTH = {"max_new_tokens": 10, "do_sample": False}
ENDS = list(range(30, 52))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ending_soon(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, which learns its positions."""
    tokenizer = bytes_tokenizer(128)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    torch.manual_seed(3)  # rows end at different lengths
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2))
    return ending_soon(save(tmp_path_factory.mktemp("gpt2"), model, tokenizer))


def ending_soon(folder: str) -> str:
    """The model with many eos tokens, so that rows end at different lengths."""
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ENDS}))
    return folder


def spec_of(folder: str, batch: dict[str, Any], task: str = "text-generation", **params: Any) -> JobSpec:
    values = {"task": task, "model": {"name": folder, "dtype": "float32"}, "input": "in", "output": "out"}
    return JobSpec.build({**values, "batch": {"continuous": True, **batch}, "params": {**LENGTH, **params}})


def predicted(spec: JobSpec, texts: list[str]) -> tuple[list[Any], Any]:
    """Output columns of the rows that made it, and what became of all."""
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=0.01)  # one thread
    columns = {"text": pa.array(texts)}
    places = pa.table({"file": ["a"] * len(texts), "row": pa.array(range(len(texts)), pa.int64())})
    features = runner.task.preprocess(columns, places).table.append_column(POSITION, places["row"])
    choice = runner.propose(features, len(texts), columns)
    size = 32 if spec.batch.size == "auto" else spec.batch.size
    assert choice == RuntimeChoice(
        size, "float32", choice.device, spec.engine.name, dedupe=True, share_prefixes=True
    )
    runner.apply(choice)
    result = runner.predict(features)
    _, arrays, _ = runner.postprocess(result.outputs, columns)
    return [array.to_pylist() for array in arrays], result.stats


@cache
def alone(folder: str, *texts: str) -> list[str]:
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        made = model.generate(**inputs, **LENGTH, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(made, skip_special_tokens=True))
    return found


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        *(("llama", batch) for batch in ({}, {"size": 1}, {"size": 8}, {"size": 3, "tokens": 5})),
        *(("gpt2", batch) for batch in ({"size": 8}, {"size": 3, "tokens": 5})),
    ],
)
def test_rows_get_what_they_get_alone(
    kind: str, batch: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    spec = spec_of(folder, batch, return_full_text=False, details=True)
    (texts, reasons, _, new), result = predicted(spec, TEXTS)
    expected = alone(folder, *TEXTS)
    assert len(set(expected)) > 6
    assert texts == expected
    assert {"stop", "length"} == set(reasons)
    assert len(set(new)) > 2
    assert result.batches == 1
    assert result.padded_tokens == result.tokens


def test_log_probs_are_those_of_batches(llama: str) -> None:
    options = {"return_full_text": False, "log_probs": True}
    (_, ids, found), _ = predicted(spec_of(llama, {}, **options), TEXTS)
    (_, same, expected), _ = predicted(spec_of(llama, {"continuous": False, "size": 8}, **options), TEXTS)
    assert ids == same
    assert list(chain(*found)) == pytest.approx(list(chain(*expected)), abs=1e-4)


def test_a_row_that_fails_is_alone_rejected_with_its_error(tmp_path: Path) -> None:
    folder = ending_soon(tiny_llama(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("☃")  # a token that the model has no embedding of
    tokenizer.save_pretrained(folder)
    texts = [*TEXTS[:3], "a ☃", *TEXTS[3:6]]
    (made,), result = predicted(spec_of(folder, {}, return_full_text=False), texts)
    assert made == alone(folder, *TEXTS[:6])
    ((row, error),) = result.failures
    assert row == 3
    assert "continuous batching failed: index out of range" in str(error)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"do_sample": True}, "random state shared by all rows"),
        ({"num_beams": 2}, "does not support num_beams=2"),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
            "repetition_penalty=1.2, no_repeat_ngram_size=2",
        ),
        ({"bad_words": ["a"], "stop": ["b"]}, "stop_strings=['b'], bad_words_ids="),
        ({"begin_with": "a"}, "begin_with='a'"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
    ],
)
def test_what_it_cannot_do_is_a_fault_of_the_plan(
    llama: str, tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    (fault,) = faults_of(spec_of(llama, {}, **params), tmp_path)
    assert fault.startswith("engine continuous")
    assert message in fault


def test_other_tasks_and_other_caches_are_refused(llama: str, tmp_path: Path) -> None:
    classifier = tiny_bert(tmp_path / "bert")
    spec = spec_of(classifier, {}, "text-classification").model_copy(update={"params": {}})
    assert faults_of(spec, tmp_path) == [
        "engine continuous cannot run task text-classification, which needs the outputs of the model for padded "
        "inputs; use engine torch or openvino or onnx"
    ]
    folder = tiny_llama(tmp_path / "llama")
    path = Path(folder) / "config.json"
    kinds = ["full_attention", "linear_attention"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": kinds}))
    assert "no cache for layers of kind linear_attention" in faults_of(spec_of(folder, {}), tmp_path)[0]


def faults_of(spec: JobSpec, folder: Path) -> list[str]:
    """What the plan says is wrong."""
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": TEXTS}), folder / "in" / "a.parquet")
    places = {
        "input": spec.input.model_copy(update={"path": str(folder / "in")}),
        "output": spec.output.model_copy(update={"path": str(folder / "out")}),
    }
    with pytest.raises(SpecError) as error:
        make_plan(spec.model_copy(update=places))
    return error.value.faults


def rows_and_output(folder: Path) -> dict[str, Any]:
    """Sections of a spec, with TEXTS as the first file of the input."""
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": TEXTS[:6]}), folder / "in" / "a.parquet")
    source = {"path": str(folder / "in"), "split_rows": 6}
    return {"input": source, "output": {"path": str(folder / "out"), "prefix": "new_"}}


def test_the_engine_is_part_of_the_identity(llama: str, tmp_path: Path) -> None:
    values = {**spec_of(llama, {}).model_dump(exclude={"batch", "engine"}), **rows_and_output(tmp_path)}
    engines = [{}, {"engine": "torch"}, {"engine": "continuous"}, {"batch": {"continuous": True}}]
    torch_, same, continuous, alias = (make_plan(JobSpec.build({**values, **one})) for one in engines)
    assert torch_.fingerprint == same.fingerprint != continuous.fingerprint == alias.fingerprint
    assert [torch_.identity["engine"], alias.identity["engine"]] == [
        {"name": "torch"},
        {"name": "continuous"},
    ]


@pytest.mark.parametrize("form", [{"engine": "continuous"}, {"batch": {"continuous": True}}])
def test_an_output_of_a_version_without_engines_is_continued(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    values = {**spec_of(llama, {}).model_dump(exclude={"batch", "engine"}), **rows_and_output(tmp_path)}
    out, alias = tmp_path / "out", JobSpec.build({**values, "batch": {"continuous": True}})
    with monkeypatch.context() as patch:  # as the version before computed it
        patch.setattr(plan, "job_identity", lambda *given: {**job_identity(*given), "engine": "torch"})
        assert job_here(alias).exit_code == 0
    path = out / "__hfbatch" / "job.json"
    old = json.loads(path.read_text())
    del old["spec"]["engine"], old["settled"]["engine"]
    path.write_text(json.dumps(old))
    before = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*")}

    pq.write_table(pa.table({"text": TEXTS[6:9]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(SpecError, match=r"differs in engine.name \(there: 'continuous', now: 'torch'\)"):
        make_plan(JobSpec.build(values))
    spec = JobSpec.build({**values, **form})
    for _ in range(2):
        assert job_here(spec).exit_code == 0
    after = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*")}
    assert (len(after), before.items() <= after.items()) == (2, True)
    assert verify_output(str(out)) == []
    now = json.loads(path.read_text())
    assert now["fingerprint"] == old["fingerprint"]
    assert (now["settled"]["engine"], now["spec"]["engine"]["name"]) == ("continuous", "continuous")
    texts = pq.read_table(sorted(out.glob("part-*")))["new_generated_text"].to_pylist()
    assert sorted(texts) == sorted(map(add, TEXTS[:9], alone(llama, *TEXTS[:9])))


def test_each_request_has_its_own_maximum_of_new_tokens(llama: str) -> None:
    engine = ContinuousEngine(EngineConfig(llama, "AutoModelForCausalLM", "float32"))
    decoding = Runner(RunnerConfig.of(spec_of(llama, {}), pin(ModelSpec(name=llama)))).task.decoding
    decoding.eos_token_id = -1
    requests = [Request([5, 6, 7], most) for most in (8, 2, 5, None)]
    found = dict(engine.complete(requests, decoding, 4, log_probs=True))
    assert [len(found[place].tokens) for place in range(4)] == [8, 2, 5, 10]
    assert all(found[3].tokens[: len(made.tokens)] == made.tokens for made in found.values())
    assert all(len(made.log_probs or ()) == len(made.tokens) for made in found.values())
    place, made = next(engine.complete(requests, decoding, 4))  # the others are stopped
    assert made.tokens == found[place].tokens
    assert list(engine.complete([], decoding, 4)) == []


def test_a_row_without_finite_logits_is_distinguished_from_the_others(llama: str) -> None:
    spec = spec_of(llama, {"size": 4})
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
    runner.apply(RuntimeChoice(4, "float32", "cpu"))
    with torch.no_grad():
        weights = runner.engine.model.get_input_embeddings().weight
        weights[runner.task.tokenizer("Z")["input_ids"][-1]] = torch.nan
    texts = [*TEXTS[:3], "Zebra", *TEXTS[3:6]]
    places = pa.table({"file": ["x"] * len(texts), "row": pa.array(range(len(texts)), pa.int64())})
    found = runner.predict(runner.preprocess({"text": pa.array(texts)}, places).features).stats
    assert [row for row, _ in found.failures] == [3]
    assert found.kept.tolist() == [0, 1, 2, 4, 5, 6]
