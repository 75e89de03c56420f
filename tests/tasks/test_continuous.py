"""Continuous batching gives every row what `generate` gives it alone, and refuses what it cannot do."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.prepare import POSITION
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.models.text import CORPUS, bytes_tokenizer, save, tiny_bert, tiny_llama

TEXTS = [CORPUS[k][: 3 + 2 * k] for k in range(24)]
LENGTH = {"max_new_tokens": 16, "do_sample": False}
ENDS = list(range(30, 52))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ending_soon(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, which learns its positions."""
    tokenizer = bytes_tokenizer(128)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
    torch.manual_seed(0)
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
    choice = runner.propose(features)
    assert choice == RuntimeChoice(
        32 if spec.batch.size == "auto" else spec.batch.size, "float32", choice.device
    )
    runner.apply(choice)
    result = runner.predict(features)
    _, arrays, _ = runner.postprocess(result.outputs, columns)
    return [array.to_pylist() for array in arrays], result.stats


def alone(folder: str, texts: list[str]) -> list[str]:
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


@pytest.mark.parametrize("batch", [{}, {"size": 1}, {"size": 8}, {"size": 3, "tokens": 5}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_get_what_they_get_alone(
    kind: str, batch: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    spec = spec_of(folder, batch, return_full_text=False, details=True)
    (texts, reasons, _, new), result = predicted(spec, TEXTS)
    expected = alone(folder, TEXTS)
    assert len(set(expected)) > 10
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
    assert made == alone(folder, TEXTS[:6])
    ((row, error),) = result.failures
    assert row == 3
    assert "continuous batching failed: index out of range" in str(error)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"do_sample": True}, "random state shared by all rows"),
        ({"num_beams": 2}, "cannot do num_beams=2"),
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
    assert fault.startswith("batch.continuous")
    assert message in fault


def test_other_tasks_and_other_caches_are_refused(llama: str, tmp_path: Path) -> None:
    classifier = tiny_bert(tmp_path / "bert")
    spec = spec_of(classifier, {}, "text-classification").model_copy(update={"params": {}})
    assert "batch.continuous is for text-generation" in faults_of(spec, tmp_path)[0]
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


def test_a_rerun_may_batch_in_another_way(llama: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in" / "a.parquet")
    values = spec_of(llama, {}).model_dump() | {
        "input": str(tmp_path / "in"),
        "output": {"path": str(tmp_path / "out"), "prefix": "new_", "keep": []},
    }
    plans = [
        make_plan(JobSpec.build({**values, "batch": {"continuous": wanted}})) for wanted in (True, False)
    ]
    assert plans[0].fingerprint == plans[1].fingerprint


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
