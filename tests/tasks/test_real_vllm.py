"""The real vLLM, in an environment of its own, against torch: SmolLM2-135M-Instruct in float32. Runs with `-m vllm` by hand.

HFBATCH_VLLM_PYTHON names the Python of the environment; `python -m tests.benchmarks.vllm --tests` makes one, and runs these tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from hfbatch import JobSpec
from hfbatch.cli.demo_generate import QUESTIONS
from hfbatch.engines.base import DeviceLostError
from hfbatch.engines.vllm import VLLMEngine
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from tests.benchmarks.tools import smollm2
from tests.jobs.tools import write_shards
from tests.models.text import lora_adapter

PYTHON = os.environ.get("HFBATCH_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="HFBATCH_VLLM_PYTHON names no Python with vLLM"),
]
VLLM = {
    "name": "vllm",
    "python": PYTHON,
    "arguments": {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 28},
}
GREEDY = {
    **{"do_sample": False, "max_new_tokens": 24, "return_full_text": False},
    **{"details": True, "log_probs": True},
}
CHATS = pa.array([[{"role": "user", "content": question}] for question in QUESTIONS[:8]])


@contextmanager
def running(model: str, engine: Any, folder: Path) -> Iterator[Runner]:
    """A runner with its model loaded; its server ends with the block."""
    values = {
        **{"task": "text-generation", "model": {"name": model, "dtype": "float32"}, "engine": engine},
        **{"input": str(write_shards(folder / "in", ["a", "b"])), "output": str(folder / "out")},
    }
    runner = Runner(make_plan(JobSpec.build({**values, "params": GREEDY})).runner)
    runner.load()
    try:
        yield runner
    finally:
        if isinstance(runner.engine, VLLMEngine):
            runner.engine.close()


@pytest.fixture(scope="module")
def model() -> str:
    return smollm2()


@pytest.fixture(scope="module")
def torch_runner(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with running(model, "torch", tmp_path_factory.mktemp("torch")) as runner:
        yield runner


@pytest.fixture(scope="module")
def vllm_runner(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with running(model, VLLM, tmp_path_factory.mktemp("vllm")) as runner:
        yield runner


def columns(runner: Runner, **params: Any) -> dict[str, list[Any]]:
    """The output columns of the chats, none of which is rejected."""
    done = runner.with_params(params).run({"messages": CHATS})
    assert not done.rejects
    return {name: column.to_pylist() for name, column in done.columns.items()}


def assert_alike(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    """The same tokens, with log-probabilities that differ by rounding."""
    for name in ("generated_text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens"):
        assert found[name] == wanted[name], name
    ours, theirs = (np.concatenate(columns["log_probs"]) for columns in (found, wanted))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_greedy_texts_are_those_of_torch(vllm_runner: Runner, torch_runner: Runner) -> None:
    assert_alike(columns(vllm_runner), columns(torch_runner))


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3, "stop": ["."]}, {"min_new_tokens": 20}],
    ids=lambda options: " ".join(options),
)
def test_options_of_decoding_have_the_meaning_of_transformers(
    vllm_runner: Runner, torch_runner: Runner, options: dict[str, Any]
) -> None:
    assert_alike(columns(vllm_runner, **options), columns(torch_runner, **options))


def test_a_sampled_row_has_a_seed_of_its_own(vllm_runner: Runner) -> None:
    alike = pa.array([CHATS[0].as_py()] * 4)
    sampling = vllm_runner.with_params({"do_sample": True, "temperature": 1.0})
    first, again = (sampling.run({"messages": alike}).columns["token_ids"].to_pylist() for _ in range(2))
    assert first == again
    assert len({tuple(row) for row in first}) > 1


def test_a_schema_gives_objects_or_rejects_that_were_cut(vllm_runner: Runner) -> None:
    kinds = {"city": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}}
    schema = {"type": "object", "properties": kinds, "required": ["city", "size"]}
    typed = vllm_runner.with_params({"constraint": {"json_schema": schema}, "max_new_tokens": 40})
    done = typed.run({"messages": CHATS})
    assert {reject.error for reject in done.rejects} <= {"IncompleteText"}
    rows = zip(done.columns["generated_text"].to_pylist(), done.columns["parsed"].to_pylist(), strict=True)
    for text, parsed in rows:
        assert json.loads(text) == parsed
        assert parsed["size"] in ("small", "large")


def test_a_row_that_vllm_refuses_is_a_reject(vllm_runner: Runner) -> None:
    long = [[{"role": "user", "content": "word " * 400}]]
    done = vllm_runner.run({"messages": pa.array([CHATS[0].as_py(), *long, CHATS[1].as_py()])})
    assert done.positions.tolist() == [0, 2]
    assert [(reject.position, reject.error) for reject in done.rejects] == [(1, "RefusedError")]


def test_an_adapter_gives_the_texts_of_the_merged_model(model: str, tmp_path: Path) -> None:
    adapter = lora_adapter(tmp_path / "adapter", model, 8, tmp_path / "merged")
    with (
        running(str(adapter), VLLM, tmp_path) as beside,
        running(str(tmp_path / "merged"), "torch", tmp_path) as merged,
    ):
        assert_alike(columns(beside), columns(merged))


def test_a_server_that_is_killed_loses_the_device(model: str, tmp_path: Path) -> None:
    with running(model, VLLM, tmp_path) as runner:
        runner.run({"messages": CHATS[:1]})
        servers = [one for one in psutil.Process().children() if PYTHON in one.cmdline()]
        assert servers
        for server in servers:
            server.kill()
        with pytest.raises(DeviceLostError):
            runner.run({"messages": CHATS})
