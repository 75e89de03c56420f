"""Constrained texts: a model of random weights writes nothing but texts that satisfy the constraint, and their values."""

from __future__ import annotations

import json
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from hfbatch import SpecError
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.continuous import ContinuousEngine
from hfbatch.engines.torch import TorchEngine
from hfbatch.output.layout import JOB
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.rows import RowPredictor
from hfbatch.tasks.generation.constraint import ConstraintSpec, closed, with_schema
from hfbatch.tasks.generation.json_values import NumberOutOfRange, parser_of
from hfbatch.tasks.generation.text_generation import TextGeneration
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, read_rejects
from tests.models.text import CHAT_TEMPLATE, CORPUS, tiny_llama, wordpiece_tokenizer
from tests.tasks.drive import features_of, forward, make, run

ORDER: dict[str, Any] = {
    "$defs": {"Place": {"type": "object", "properties": {"town": {"enum": ["Rome", "Oslo"]}, "zip": {"type": "integer", "minimum": 0, "maximum": 99999}}}},
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["open", "paid", "late"]},
        "price": {"type": "number", "minimum": 0, "maximum": 99},
        "count": {"type": "integer", "minimum": -5, "maximum": 5000},
        "urgent": {"type": "boolean"},
        "codes": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z]{2}$"}, "maxItems": 3},
        "place": {"$ref": "#/$defs/Place"},
        "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        "level": {"type": ["integer", "null"], "minimum": 1, "maximum": 3},
        "rank": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["status", "price", "count", "urgent", "codes", "place", "note", "level"],
}  # fmt: skip
ORDER_TYPE = pa.struct(
    [
        ("status", pa.string()),
        ("price", pa.float64()),
        ("count", pa.int64()),
        ("urgent", pa.bool_()),
        ("codes", pa.list_(pa.string())),
        ("place", pa.struct([("town", pa.string()), ("zip", pa.int64())])),
        ("note", pa.string()),
        ("level", pa.int64()),
        ("rank", pa.int64()),
    ]
)
SAMPLED = {
    "do_sample": True,
    "temperature": 2.0,
    "top_k": 0,
    "max_new_tokens": 160,
    "return_full_text": False,
}
GREEDY = {"do_sample": False, "max_new_tokens": 40, "return_full_text": False}
CHOICES = ["yes", "no", "not sure", 'a "quoted"\nline', "é✓"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model with more embeddings than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("llama")
    return tiny_llama(folder, CHAT_TEMPLATE, max_position_embeddings=512, vocab_size=500)


def task_of(folder: str, constraint: dict[str, Any], **params: Any) -> TextGeneration:
    return make(TextGeneration, folder, constraint=constraint, **params)


def texts_of(
    folder: str, constraint: dict[str, Any], rows: int = 12, size: int = 12, **params: Any
) -> pa.Table:
    return run(task_of(folder, constraint, **params), {"text": CORPUS[:rows]}, size)


def test_each_row_of_a_job_is_a_valid_object_or_a_reject_that_was_cut(llama: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(24), "text": CORPUS[:24]}), tmp_path / "in/rows.parquet")
    (tmp_path / "order.json").write_text(json.dumps(ORDER))
    params = {**SAMPLED, "max_new_tokens": 120, "constraint": {"json_schema": str(tmp_path / "order.json")}}
    spec = make_spec(
        "text-generation",
        llama,
        tmp_path / "in",
        tmp_path / "out",
        params=params,
        rejects={"max_fraction": 1},
    )
    job_here(spec)
    made, rejects = read_output(tmp_path / "out"), read_rejects(tmp_path / "out")
    assert made.schema.field("parsed").type == ORDER_TYPE
    assert json.loads((tmp_path / "out" / JOB).read_text())["versions"]["llguidance"] == version("llguidance")
    assert 0 < len(rejects) < 24 == len(made) + len(rejects)
    check = Draft202012Validator({**ORDER, "additionalProperties": False})
    for row in made.to_pylist():
        value = json.loads(row["generated_text"])
        check.validate(value)
        expected = {"rank": None, **value, "place": {"town": None, "zip": None, **value["place"]}}
        assert row["parsed"] == expected
    for row in rejects:
        assert row["hfbatch_error"] == "IncompleteText"
        assert re.search(r"params.max_new_tokens=120 enough\? \{", row["hfbatch_message"])
    (tmp_path / "order.json").write_text(json.dumps({"type": "boolean"}))
    with pytest.raises(SpecError, match=r"it differs in params.constraint.json_schema"):
        make_plan(spec)


def test_the_order_of_properties_belongs_to_the_identity() -> None:
    one, other = (
        ConstraintSpec(json_schema={"properties": dict.fromkeys(names, True)}).model_dump()
        for names in ("ab", "ba")
    )
    assert one != other
    assert ConstraintSpec.model_validate(one).model_dump() == one


@pytest.mark.parametrize("options", [SAMPLED, {**GREEDY, "repetition_penalty": 1.5}])
def test_a_regular_expression_matches_the_whole_text(llama: str, options: dict[str, Any]) -> None:
    pattern = r"(Mr|Mrs|Dr) [A-Z][a-z]{2,6}, \d{2,3}\syears/\w\."
    made = texts_of(llama, {"regex": pattern}, **options)
    assert made.column_names == ["generated_text"]
    assert all(re.fullmatch(pattern, text, re.ASCII) for text in made["generated_text"].to_pylist())


def test_a_text_that_may_go_on_is_complete_where_it_is_cut(llama: str) -> None:
    made = texts_of(llama, {"regex": "[a-z ]+"}, **{**GREEDY, "max_new_tokens": 5}, details=True)
    assert "length" in made["finish_reason"].to_pylist()
    assert all(re.fullmatch("[a-z ]+", text) for text in made["generated_text"].to_pylist())


def test_each_choice_is_made_sometimes(llama: str) -> None:
    made = texts_of(llama, {"choices": CHOICES}, 72, 36, **SAMPLED)
    assert made.schema.field("parsed").type == pa.string()
    assert {*made["parsed"].to_pylist()} == {*CHOICES}
    assert made["parsed"] == made["generated_text"]


@pytest.mark.parametrize(
    "options", [SAMPLED, {**SAMPLED, "num_return_sequences": 2, "top_k": 20, "top_p": 0.9}, GREEDY]
)
def test_a_row_gets_the_same_text_in_any_batch(llama: str, options: dict[str, Any]) -> None:
    constraint = {"json_schema": {"type": "array", "items": {"enum": ["a", "bc", 5, None]}, "maxItems": 6}}
    alone = texts_of(llama, constraint, size=1, **options)
    assert texts_of(llama, constraint, size=5, **options).equals(alone)
    kind = pa.list_(pa.string())
    several = "num_return_sequences" in options
    assert alone.schema.field("parsed").type == (pa.list_(kind) if several else kind)
    if options is not GREEDY:
        assert len({str(value) for value in alone["parsed"].to_pylist()}) > 4


def test_sampling_draws_from_the_tokens_that_are_allowed(llama: str) -> None:
    """With the top token alone to draw from, sampling is greedy: it would draw a masked one before the mask."""
    constraint = {"regex": "[A-Z]{8}"}
    sampled = texts_of(llama, constraint, **{**SAMPLED, "top_k": 1})
    assert sampled.equals(texts_of(llama, constraint, **GREEDY))


def test_chats_get_the_answer_alone_as_a_value(llama: str) -> None:
    chats = [[{"role": "user", "content": text}] for text in CORPUS[:3]]
    task = task_of(llama, {"choices": CHOICES}, **{**GREEDY, "return_full_text": None})
    outputs = run(task, {"text": CORPUS[:3]})
    assert [row["generated_text"] for row in outputs.to_pylist()] == [
        text + row["parsed"] for text, row in zip(CORPUS, outputs.to_pylist(), strict=False)
    ]
    fields = task.fields_for({"messages"})
    assert [field.name for field in fields] == ["generated_text", "parsed"]

    columns = {"messages": chats}
    arrays = task.postprocess(forward(task, features_of(task, columns).table), {"messages": pa.array(chats)})
    assert [chat[-1]["content"] for chat in arrays[0].to_pylist()] == arrays[1].to_pylist()


SCALAR = {"type": "integer"}
TYPES: list[tuple[Any, pa.DataType]] = [
    ({"enum": ["a", "b", None]}, pa.string()),
    ({"enum": [1, 2.5]}, pa.float64()),
    ({"enum": [1, "a"]}, pa.string()),
    ({"const": True}, pa.bool_()),
    ({"oneOf": [SCALAR, {"type": "null"}]}, pa.int64()),
    ({"anyOf": [SCALAR, {"type": "string"}]}, pa.string()),
    ({"allOf": [{"$ref": "#/$defs/n"}]}, pa.list_(pa.string())),
    ({"type": "object", "additionalProperties": SCALAR}, pa.string()),
    ({"type": "object", "properties": {"a": SCALAR}, "additionalProperties": True}, pa.string()),
    ({"type": "object", "properties": {"a": SCALAR}, "title": "A"}, pa.struct([("a", pa.int64())])),
    ({"type": "object", "properties": {}}, pa.string()),
    ({"type": "object", "properties": {"a": SCALAR}, "patternProperties": {"b": SCALAR}}, pa.string()),
    ({"type": "array"}, pa.list_(pa.string())),
    ({"type": "array", "prefixItems": [SCALAR]}, pa.string()),
    ({"type": ["number", "string"]}, pa.string()),
    ({"$ref": "#/$defs/none"}, pa.string()),
    ({"properties": {"a": SCALAR}}, pa.string()),
]


@pytest.mark.parametrize(("schema", "kind"), TYPES, ids=lambda value: str(value)[:60])
def test_the_type_follows_from_the_schema(schema: Any, kind: pa.DataType, tmp_path: Path) -> None:
    definitions = {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}
    found = parser_of(ConstraintSpec(json_schema={**schema, "$defs": definitions}))
    assert found is not None
    assert found[0] == kind


def test_a_type_that_references_multiply_is_json() -> None:
    twice = [{key: {"$ref": f"#/$defs/d{k + 1}"} for key in "ab"} for k in range(15)]
    definitions = {f"d{k}": {"type": "object", "properties": both} for k, both in enumerate(twice)}
    found = parser_of(
        ConstraintSpec(json_schema={"$defs": {**definitions, "d15": SCALAR}, "$ref": "#/$defs/d0"})
    )
    assert found is not None
    assert found[0] == pa.string()
    assert found[1]('{"a": 1.10}') == '{"a": 1.10}'


def test_open_values_are_json_and_large_numbers_are_errors() -> None:
    kind = {"type": "object", "properties": {"any": {}, "whole": SCALAR, "real": {"type": "number"}}}
    found = parser_of(ConstraintSpec(json_schema=kind))
    assert found is not None
    parse = found[1]
    assert parse('{"any": {"é": [1, null]}, "real": 7}') == {"any": '{"é": [1, null]}', "real": 7.0}
    assert parse('{"any": null, "whole": -9223372036854775808}') == {"any": None, "whole": -(2**63)}
    for text in ('{"whole": 9223372036854775808}', '{"real": 1e999}', '{"real": 1%s}' % ("0" * 400)):
        with pytest.raises(NumberOutOfRange, match="cannot hold"):
            parse(text)


def test_objects_are_closed_where_they_do_not_say_otherwise() -> None:
    inner = {"properties": {"properties": {"properties": {"a": SCALAR}}}}
    assert closed({"items": inner, "additionalProperties": True}) == {
        "items": {
            "properties": {"properties": {"properties": {"a": SCALAR}, "additionalProperties": False}},
            "additionalProperties": False,
        },
        "additionalProperties": True,
    }
    parts = {"allOf": [{"properties": {"a": SCALAR}}, {"properties": {"b": SCALAR}}]}
    assert closed(parts) == parts


DEEP: Any = {}
for _ in range(40):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choices": ["a", "b"]}, "exactly one of"),
        ({"json_schema": "schema.json"}, "is no JSON Schema"),
        ({"json_schema": DEEP}, "deeper than 32"),
        ({"json_schema": "{]"}, "Expecting property name"),
        ({"json_schema": {"const": date(2026, 1, 31)}}, "is not JSON: .* put the value in quotes"),
        ({"regex": "a" * 70_000}, "more than 65536"),
        ({"choices": ["a", "a"]}, "must differ"),
        ({"choices": ["a", "b "]}, "end with a space"),
        ({"lark": "start: /a/"}, "Extra inputs"),
    ],
)
def test_what_is_no_constraint_is_refused(constraint: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConstraintSpec.model_validate(constraint)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_file_without_a_schema_is_a_fault(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "schema.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=r"schema.json' (cannot be read|is not JSON|is no JSON Schema)"):
        with_schema({"constraint": {"json_schema": str(path)}})


LARGE = {"allOf": [{"anyOf": [{"const": k}, {"const": k + 1}]} for k in range(40)]}


@pytest.mark.parametrize(
    ("constraint", "params", "message"),
    [
        ({"regex": "(a"}, {}, "refused by llguidance: .*unclosed group"),
        ({"json_schema": {"type": "text"}}, {}, "refused by llguidance: Invalid type: text"),
        ({"json_schema": {"type": [{}], "properties": 1, "items": 2}}, {}, "refused by llguidance: "),
        ({"json_schema": {"not": {}}}, {}, "refused by llguidance: Unimplemented keys"),
        ({"regex": "a"}, {"num_beams": 2}, "does not work with num_beams=2"),
        ({"regex": "a"}, {"stop": ["x"], "begin_with": "b"}, r"stop_strings=\['x'\], begin_with='b'"),
        ({"json_schema": LARGE}, {}, "refused by llguidance: schema too large"),
    ],
)
def test_what_cannot_work_is_a_fault(
    llama: str,
    constraint: dict[str, Any],
    params: dict[str, Any],
    message: str,
) -> None:
    task = task_of(llama, constraint, do_sample=False, **params)
    (fault,) = task.check()
    assert task.output_fields()  # the plan goes on, to report all faults together
    assert re.search(message, fault)
    assert task_of(llama, {"regex": "a"}, do_sample=False).check() == []


def test_a_tokenizer_without_constraints_is_a_fault(llama: str) -> None:
    task = task_of(llama, {"regex": "a"})
    task.__dict__["tokenizer"] = wordpiece_tokenizer()
    (fault,) = [fault for fault in task.check() if "llguidance" in fault]
    assert "does not support the tokenizer" in fault


@pytest.mark.parametrize(
    "constraint",
    [{"choices": ["yes", "no", "perhaps later"]}, {"regex": "[a-z]{2,30}"}, {"json_schema": ORDER}],
)
def test_continuous_batching_writes_what_batches_write(llama: str, constraint: dict[str, Any]) -> None:
    task = task_of(llama, constraint, do_sample=False, max_new_tokens=40, return_full_text=False)
    features = features_of(task, {"text": [*CORPUS[:5], "a", "b"]}).table
    config = EngineConfig(llama, task.auto_class, "float32")
    want = Predictor(task, TorchEngine(config), 8).predict(features).outputs
    found = RowPredictor(task, ContinuousEngine(config), 3).predict(features).outputs
    for name in ("tokens", "stopped", "complete"):
        assert found[name].to_pylist() == want[name].to_pylist()
    assert len({*map(str, found["tokens"].to_pylist())}) > 1 or "choices" in constraint


def test_a_missing_package_is_a_fault(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbatch.tasks.generation.constraint.find_spec", lambda name: None)
    assert task_of(llama, {"regex": "a"}).check() == [
        "params.constraint needs llguidance; pip install 'hfbatch[constraint]'"
    ]
