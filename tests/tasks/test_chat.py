"""Chats as prompts: what the template gets, and what the pipeline answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.prepare import preprocess
from hfbatch.spec.job import JobSpec
from hfbatch.tasks.generation.chat import is_tools
from hfbatch.tasks.generation.text_generation import TextGeneration
from tests.models.text import CHAT_TEMPLATE, CORPUS, tiny_llama
from tests.tasks.drive import features_of, make

TEMPLATE = (
    "{% for tool in tools or [] %}<|system|>{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}"
    "{{ message['content'] or '' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '' if thinking | default(true) else 'no' }}{% endif %}"
)
GREEDY = {"max_new_tokens": 8, "do_sample": False}
FUNCTION = {
    "type": "function",
    "function": {"name": "river", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
ASKED = [
    [{"role": "system", "content": CORPUS[-k]}] * (k % 3 == 0)
    + [{"role": "user", "content": f"{CORPUS[k]} {CORPUS[k + 5]}"[: 10 + 3 * k]}]
    + [{"role": "assistant", "content": CORPUS[k + 9][:12]}, {"role": "user", "content": "Go on"}]
    * (k % 4 == 1)
    for k in range(12)
]
OPEN = [[*chat, {"role": "assistant", "content": CORPUS[k][:9]}] for k, chat in enumerate(ASKED)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    return tiny_llama(folder, chat_template=TEMPLATE, max_position_embeddings=1024)


def prompts(task: TextGeneration, **columns: Any) -> list[str]:
    ids = features_of(task, columns).table["input_ids"].to_pylist()
    return [task.tokenizer.decode(row) for row in ids]


def answers(task: TextGeneration, size: int, **columns: Any) -> list[Any]:
    """Answers of every row, in batches of size rows."""
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32", concurrent=False))
    outputs = Predictor(task, engine, size).predict(features_of(task, columns).table).outputs
    return task.postprocess(outputs, {name: pa.array(values) for name, values in columns.items()})[
        0
    ].to_pylist()


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("chats", [ASKED, OPEN])
def test_chats_are_answered_and_continued_as_the_pipeline_does(
    llama: str, chats: list[Any], size: int
) -> None:
    oracle = pipeline("text-generation", model=llama, dtype=torch.float32, device="cpu")
    expected = [oracle(chat, **GREEDY)[0]["generated_text"] for chat in chats]
    assert len({str(answer[-1]) for answer in expected}) > 6
    assert answers(make(TextGeneration, llama, **GREEDY), size, messages=chats) == expected


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}])
@pytest.mark.parametrize("chats", [ASKED, OPEN])
def test_prompts_are_what_the_template_writes(llama: str, chats: list[Any], options: dict[str, bool]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    goes_on = options.get("continue_final_message", chats is OPEN)
    asks = options.get("add_generation_prompt", True) and not goes_on
    expected = [
        tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=asks, continue_final_message=goes_on
        )
        for chat in chats
    ]
    assert prompts(make(TextGeneration, llama, **options), messages=chats) == expected


def test_a_last_answer_can_be_answered_instead_of_continued(llama: str) -> None:
    for options in ({"add_generation_prompt": True}, {"continue_final_message": False}):
        task = make(TextGeneration, llama, **GREEDY, **options)
        assert task.check() == []
        assert all(prompt.endswith("</s><|assistant|>") for prompt in prompts(task, messages=OPEN))
        for chat, answer in zip(OPEN, answers(task, 8, messages=OPEN), strict=True):
            assert answer[:-1] == chat
            assert answer[-1]["role"] == "assistant"


def test_variables_of_the_template_reach_it(llama: str) -> None:
    task = make(TextGeneration, llama, chat_template_kwargs={"thinking": False})
    assert all(prompt.endswith("<|assistant|>no") for prompt in prompts(task, messages=ASKED))


@pytest.mark.parametrize("as_json", [True, False])
def test_each_chat_has_its_own_tools(llama: str, as_json: bool) -> None:
    tools = [[FUNCTION] * (k % 3) for k in range(len(ASKED))]
    column: Any = [json.dumps(functions) for functions in tools] if as_json else tools
    assert is_tools(pa.array(column).type)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = [
        tokenizer.apply_chat_template(chat, tools=row, tokenize=False, add_generation_prompt=True)
        for chat, row in zip(ASKED, tools, strict=True)
    ]
    task = make(TextGeneration, llama)
    assert prompts(task, messages=ASKED, tools=column) == expected
    assert expected != prompts(task, messages=ASKED)


def test_fields_that_a_message_lacks_are_undefined_in_the_template(llama: str) -> None:
    calls = [{"type": "function", "function": {"name": "river"}}]
    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "user", "content": "y"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "river" in expected
    assert prompts(make(TextGeneration, llama), messages=[chat]) == [expected]


def test_an_empty_text_is_no_tools_and_what_is_no_list_is_refused(llama: str) -> None:
    task = make(TextGeneration, llama)
    assert prompts(task, messages=ASKED[:1], tools=[""]) == prompts(task, messages=ASKED[:1])
    with pytest.raises(ValueError, match="tools is a JSON dict, not a list of functions"):
        prompts(task, messages=ASKED[:1], tools=["{}"])
    with pytest.raises(ValueError, match="Expecting"):
        prompts(task, messages=ASKED[:1], tools=["["])


def test_options_of_chats_that_cannot_work_are_faults(llama: str, tmp_path: Path) -> None:
    both = {"add_generation_prompt": True, "continue_final_message": True}
    faults = make(TextGeneration, llama, **both, chat_template_kwargs={"tokenize": True}).check()
    assert len(faults) == 2
    assert "add_generation_prompt and continue_final_message are both true" in faults[0]
    assert "chat_template_kwargs cannot set tokenize" in faults[1]
    plain = make(TextGeneration, tiny_llama(tmp_path, chat_template=CHAT_TEMPLATE))
    assert "takes no tools" in plain.column_faults({"messages", "tools"})[0]
    assert make(TextGeneration, llama).column_faults({"messages", "tools"}) == []
    assert plain.column_faults({"text", "tools"}) == [
        "column tools goes with messages; leave it out for prompts"
    ]


def test_tools_are_read_where_mapped_and_a_null_is_none(llama: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    column = [json.dumps([FUNCTION]), None, "[]"]
    pq.write_table(pa.table({"messages": ASKED[:3], "tools": column}), tmp_path / "in" / "a.parquet")
    values = {"task": "text-generation", "model": llama, "output": str(tmp_path / "out")}
    source = {"path": str(tmp_path / "in")}
    plans = [
        make_plan(JobSpec.build({**values, "input": {**source, "columns": columns}}))
        for columns in ({}, {"tools": "tools"})
    ]
    assert [sorted(plan.inputs) for plan in plans] == [["messages"], ["messages", "tools"]]
    columns = {"messages": pa.array(ASKED[:3]), "tools": pa.array(column)}
    made = preprocess(plans[1].task, columns, pa.table({"file": ["a"] * 3, "row": range(3)}))
    assert made.rejects == []
    texts = [plans[1].task.tokenizer.decode(ids) for ids in made.features["input_ids"].to_pylist()]
    assert ["river" in text and text.startswith("<|system|>{") for text in texts] == [True, False, False]
