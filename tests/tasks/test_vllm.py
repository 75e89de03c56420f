"""Engine vllm: what is sent to its server, what is made of the answers, and what becomes of a server that fails.

A server in a second process stands in for vLLM, which needs an environment of its own; test_real_vllm.py has the real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from hfbatch import JobSpec
from hfbatch.engines.base import DeviceLostError
from hfbatch.engines.vllm import VLLMEngine
from hfbatch.errors import SpecError, WorkerError
from hfbatch.predict.bind import find_model
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.spec.engines import TorchEngineSpec
from tests.jobs.tools import write_shards
from tests.models import vllm_server
from tests.models.text import lora_adapter, tiny_llama
from tests.models.vllm_server import CUT, DEATH, NOT_FINITE, REFUSED, SILENCE

SERVER = Path(vllm_server.__file__)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def python(tmp_path: Path) -> str:
    """The Python of the other environment."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {SERVER} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def spec_of(llama: str, python: str, tmp_path: Path) -> Callable[..., JobSpec]:
    def made(engine: dict[str, Any] | None = None, **sections: Any) -> JobSpec:
        """A spec in float32, whose server writes down what it gets."""
        arguments = {"record": str(tmp_path / "record"), **(engine or {}).pop("arguments", {})}
        params = {
            "do_sample": False,
            "max_new_tokens": 12,
            "return_full_text": False,
            **sections.pop("params", {}),
        }
        return JobSpec.build(
            {
                "task": "text-generation",
                "model": {"name": llama, "dtype": "float32"},
                "engine": {"name": "vllm", "python": python, "arguments": arguments, **(engine or {})},
                "input": str(write_shards(tmp_path / "in", ["a", "b"])),
                "output": str(tmp_path / "out"),
                "params": params,
                **sections,
            }
        )

    return made


@pytest.fixture
def start(spec_of: Callable[..., JobSpec]) -> Iterator[Callable[..., Runner]]:
    """Starts engines, which are ended after the test."""
    runners: list[Runner] = []

    def started(**options: Any) -> Runner:
        spec = spec_of(**options)
        runner = Runner(RunnerConfig.of(spec, find_model(spec, [])), share=0.01)
        runner.load()
        runners.append(runner)
        return runner

    yield started
    for runner in runners:
        if isinstance(runner.engine, VLLMEngine):
            runner.engine.close()


def bodies(folder: Path) -> list[dict[str, Any]]:
    """The requests that the server got."""
    return [json.loads(line) for line in (folder / "record").read_text().splitlines()]


def ids_of(runner: Runner, *first: int) -> pa.Table:
    """Features of prompts: the token that begins each text, one of these, and two more."""
    return pa.table(
        {
            "input_ids": pa.array(
                [[1, token, 70, 71 + k] for k, token in enumerate(first)], pa.list_(pa.int32())
            ),
            "hfbatch_position": pa.array(range(len(first)), pa.int64()),
        }
    )


def test_texts_and_counts_are_those_of_the_answers(start: Callable[..., Runner], tmp_path: Path) -> None:
    runner = start(params={"details": True, "log_probs": True, "repetition_penalty": 1.5})
    done = runner.run({"text": pa.array(["a cat", "two", "a dog on a mat and many words more"])})
    tokens = done.columns["token_ids"].to_pylist()
    prompts = [
        runner.task.tokenizer(text)["input_ids"]
        for text in ("a cat", "two", "a dog on a mat and many words more")
    ]
    end = runner.task.decoding.eos_token_id
    assert tokens == [[*prompt[::-1], end][:12] for prompt in prompts]
    assert done.columns["log_probs"].to_pylist() == [[-float(token) for token in row] for row in tokens]
    assert done.columns["finish_reason"].to_pylist() == ["stop", "stop", "length"]
    assert done.columns["prompt_tokens"].to_pylist() == [len(prompt) for prompt in prompts]
    body = bodies(tmp_path)[0]
    assert (body["temperature"], body["max_tokens"], body["repetition_penalty"]) == (0.0, 12, 1.5)
    assert (body["stop_token_ids"], body["ignore_eos"], body["return_token_ids"]) == ([end], True, True)
    flags = json.loads((tmp_path / "record.flags").read_text())
    assert {"--enforce-eager", "--dtype", "float32", "--generation-config", "127.0.0.1"} <= {*flags}
    assert "--trust-remote-code" not in flags
    assert "--enable-prompt-tokens-details" in flags
    assert done.stats.usage == {"cached_tokens": 3}
    assert "vLLM 0.0-test" in runner.engine.device


def test_sampled_rows_have_their_own_seeds(start: Callable[..., Runner], tmp_path: Path) -> None:
    runner = start(params={"do_sample": True, "temperature": 0.7, "top_k": 5})
    for _ in range(2):
        runner.run({"text": pa.array(["same", "same", "same"])})
    sent = bodies(tmp_path)
    seeds = sorted(body["seed"] for body in sent)
    assert len(set(seeds)) == 3
    assert seeds[::2] == seeds[1::2]  # a rerun has those of the first run
    assert all((body["temperature"], body["top_k"]) == (0.7, 5) for body in sent)


def test_constraints_are_sent_and_texts_that_are_cut_off_are_rejects(
    start: Callable[..., Runner], tmp_path: Path
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    runner = start(params={"constraint": {"json_schema": schema}})
    runner.apply(runner.default_choice())
    features = ids_of(runner, 60, 61)
    long = pa.array([[1, 60], list(range(20, 40))], pa.list_(pa.int32()))
    made = runner.predict(features.set_column(0, "input_ids", long))
    assert made.outputs["complete"].to_pylist() == [[True], [False]]
    _, _, rejects = runner.postprocess(made.outputs, {"text": pa.array(["", ""])})
    assert {reject.position for reject in rejects} >= {1}
    assert "IncompleteText" in {reject.error for reject in rejects}
    sent = bodies(tmp_path)[0]["structured_outputs"]["json"]
    assert sent["x-guidance"]["key_separator"] == ": "  # as in torch
    assert {name: value for name, value in sent.items() if name != "x-guidance"} == {
        **schema,
        "additionalProperties": False,
    }


def test_a_row_that_is_refused_is_a_reject_and_the_others_are_not(start: Callable[..., Runner]) -> None:
    runner = start()
    runner.apply(runner.default_choice())
    made = runner.predict(ids_of(runner, 60, REFUSED, NOT_FINITE, CUT, 61))
    assert made.stats.kept.tolist() == [0, 4]
    reasons = {reject.position: (reject.error, reject.message) for reject in made.rejects}
    assert reasons[1][0] == "RefusedError"
    assert "400" in reasons[1][1]
    assert "this prompt is refused" in reasons[1][1]
    assert reasons[2][0] == "NonFiniteOutput"
    assert "not complete" in reasons[3][1]


def test_a_server_that_ends_loses_the_device_and_a_new_process_goes_on(
    start: Callable[..., Runner],
) -> None:
    runner = start()
    runner.apply(runner.default_choice())
    with pytest.raises(DeviceLostError, match="Segmentation fault, of a kind"):
        runner.predict(ids_of(runner, 60, DEATH, 61))
    again = start()
    again.apply(again.default_choice())
    assert again.predict(ids_of(again, 60, DEATH, 61)).stats.kept.tolist() == [0, 1, 2]


def test_a_server_that_gives_no_answer_is_ended(start: Callable[..., Runner]) -> None:
    runner = start(engine={"timeout": 0.5})
    runner.apply(runner.default_choice())
    with pytest.raises(DeviceLostError, match=r"no answer for 0\.5 s"):
        runner.predict(ids_of(runner, 60, SILENCE))
    assert runner.engine._server.poll() is not None


def test_a_server_that_does_not_start_ends_the_job_with_its_message(
    start: Callable[..., Runner], tmp_path: Path
) -> None:
    with pytest.raises(WorkerError, match="SomeModel is not supported"):
        start(engine={"arguments": {"fails": True}})
    with pytest.raises(WorkerError, match=r"engine\.python .* does not start: No such file"):
        start(engine={"python": str(tmp_path / "nowhere/python")})
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    with pytest.raises(WorkerError, match=r"did not start in 0\.3 s"):
        start(engine={"python": str(sleeper), "start_timeout": 0.3})


def test_a_server_ends_with_its_worker(spec_of: Callable[..., JobSpec], tmp_path: Path) -> None:
    """Even if the worker is killed."""
    code = (
        "import sys, time\nfrom hfbatch.engines.base import EngineConfig\nfrom hfbatch.engines.vllm import VLLMEngine\n"
        "from hfbatch.spec.engines import VLLMEngineSpec\nfolder, python, record = sys.argv[1:]\n"
        "spec = VLLMEngineSpec(name='vllm', python=python, arguments={'record': record})\n"
        "VLLMEngine(EngineConfig(folder, 'AutoModelForCausalLM', 'float32', options=spec))\ntime.sleep(600)"
    )
    spec = spec_of()
    given = [spec.model.name, spec.engine.python, str(tmp_path / "record")]
    worker = subprocess.Popen([sys.executable, "-c", code, *given], cwd=Path(__file__).parents[2])
    noted = tmp_path / "record.flags"
    while not noted.exists():
        assert worker.poll() is None
        time.sleep(0.05)
    server = psutil.Process(int((tmp_path / "record.pid").read_text()))
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    server.wait(10)


def test_an_adapter_is_run_beside_its_base_and_asked_for_by_name(
    start: Callable[..., Runner], spec_of: Callable[..., JobSpec], llama: str, tmp_path: Path
) -> None:
    folder = lora_adapter(tmp_path / "adapter", llama, rank=9)
    model = {"name": str(folder), "dtype": "float32"}
    plan = make_plan(spec_of(model=model))
    assert f"is an adapter of {Path(llama).resolve()}" in "\n".join(plan.notes)
    runner = start(model=model)
    runner.apply(runner.default_choice())
    assert runner.predict(ids_of(runner, 60)).stats.kept.tolist() == [0]
    flags = json.loads((tmp_path / "record.flags").read_text())
    given = dict(pairwise(flags))
    assert given["--model"] == given["--tokenizer"] == str(Path(llama).resolve())
    assert json.loads(given["--lora-modules"]) == {"name": "model", "path": str(folder)}
    assert (given["--served-model-name"], given["--max-lora-rank"]) == ("base", "16")
    assert "--enable-lora" in flags
    assert bodies(tmp_path)[0]["model"] == "model"


def test_the_plan_names_what_vllm_cannot_do_with_an_adapter_beside_all_else(
    spec_of: Callable[..., JobSpec], llama: str, tmp_path: Path
) -> None:
    folder = lora_adapter(tmp_path / "adapter", llama)
    written = folder / "adapter_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"use_dora": True}))
    with pytest.raises(SpecError) as found:
        make_plan(spec_of(model=str(folder), params={"num_beams": 2}))
    said = "\n".join(found.value.faults)
    assert "use_dora=true, and engine vllm runs plain LoRA" in said
    assert "num_beams=2" in said
    with pytest.raises(SpecError, match=r"is an adapter .*merge_and_unload"):
        make_plan(spec_of(model=str(folder)).model_copy(update={"engine": TorchEngineSpec(name="torch")}))


def test_the_plan_names_what_vllm_cannot_do(spec_of: Callable[..., JobSpec]) -> None:
    for sections, words in (
        ({"params": {"num_beams": 2}}, "engine vllm does not support num_beams=2"),
        (
            {"params": {"min_new_tokens": 2, "stop": ["."]}},
            "engine vllm ignores params.stop until it has generated params.min_new_tokens",
        ),
        ({"params": {"begin_with": "Yes"}}, "begin_with='Yes'"),
        ({"params": {"do_sample": True, "num_return_sequences": 2}}, "one text for each prompt"),
        ({"tokenizer": {"add_tokens": ["xyz"]}}, "engine vllm adds no tokens"),
        ({"task": "fill-mask"}, "engine vllm cannot run task fill-mask"),
        ({"task": "embedding"}, "for padded inputs; use engine torch or openvino or onnx"),
    ):
        with pytest.raises(SpecError, match="engine vllm") as found:
            make_plan(spec_of(**sections))
        assert words in str(found.value), sections
    with pytest.raises(SpecError, match="must be an absolute path"):
        spec_of(engine={"python": "vllm/bin/python"})
    for name in ("api_key", "trust_remote_code", "host"):
        with pytest.raises(SpecError, match=f"must not set {name}"):
            spec_of(engine={"arguments": {name: "x"}})


def test_a_lowered_precision_is_reported_as_not_compared(start: Callable[..., Runner], llama: str) -> None:
    runner = start(model={"name": llama, "dtype": "bfloat16"})
    columns = {"text": pa.array(["a", "b"])}
    features = runner.preprocess(columns, pa.table({"file": ["", ""], "row": [0, 1]})).features
    choice = runner.propose(features, 2, columns)
    assert choice.guard is not None
    assert choice.guard["status"] == "unguarded"
    assert (choice.batch_size, choice.engine, choice.dtype) == (256, "vllm", "bfloat16")
