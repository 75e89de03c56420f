"""The documentation in the package: topics, the generated reference, and the JSON Schema of specs."""

from __future__ import annotations

import io
import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from rich.console import Console
from typer.testing import CliRunner

from hfbatch.cli.app import app
from hfbatch.cli.docs import FOLDER, REFERENCES, list_topics, read_topic
from hfbatch.cli.reference import spec_reference, type_of
from hfbatch.console.display import markdown
from hfbatch.spec.schema import KINDS, json_schema
from tests.cases.every import EXPORTABLE
from tests.generate import ENGINES_TOPIC, ROOT, SCHEMA, measures_table, schema_text, shown_support, support

TOPICS = [topic["topic"] for topic in list_topics()]
VALIDATOR = Draft202012Validator(json_schema())
FIRST = "# yaml-language-server: $schema=../hfbatch/docs/spec.schema.json"
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
JOB = {"task": "embedding", "model": "org/model", "input": "in/", "output": "out/"}
TRAINING = {"task": "embedding", "model": "org/model", "train": "in/", "output": "out/"}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def printed(text: str, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    markdown(console, text)
    return console.file.getvalue()  # type: ignore[attr-defined]


def descriptions(model: type[BaseModel]) -> list[str]:
    """The docstrings of all fields of a spec and its sections, each as one line."""
    found = []
    for field in model.model_fields.values():
        assert field.description
        found.append(" ".join(field.description.split()))
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += descriptions(kind)
    return found


# Topics.


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_begins_with_a_heading_and_a_line_that_sums_it_up(name: str) -> None:
    heading, blank, summary, after, *_ = read_topic(name).splitlines()
    assert heading.startswith("# ")
    assert (blank, after) == ("", "")
    assert summary.endswith(".")
    assert len(summary) <= 120


def test_topics_are_listed_with_one_line_each() -> None:
    shown = json.loads(run("docs", "--json").stdout)
    assert [set(topic) for topic in shown] == [{"topic", "title", "summary"}] * len(TOPICS)
    listed = run("docs").stdout
    assert all(name in listed for name in TOPICS)
    assert {"spec", "finetune-spec", "output", "training", "benchmarks", "limits"} <= set(TOPICS)
    assert {"extending", "troubleshooting"} <= set(TOPICS)


@pytest.mark.parametrize("name", TOPICS)
def test_a_topic_is_plain_markdown_in_a_pipe(name: str) -> None:
    text = read_topic(name)
    assert run("docs", name).stdout == text
    assert json.loads(run("docs", name, "--json").stdout) == {"topic": name, "text": text}


def test_a_topic_is_formatted_on_a_terminal() -> None:
    text = read_topic("troubleshooting")
    assert printed(text, terminal=False) == text
    shown = printed(text, terminal=True)
    assert "## Exit codes" not in shown
    assert "Exit codes" in shown
    assert "|---|" not in shown


def test_an_unknown_topic_is_an_error_with_the_near_match() -> None:
    done = run("docs", "trainng", "--json")
    assert done.exit_code == 2
    (fault,) = json.loads(done.stdout)["faults"]
    assert "unknown topic 'trainng'" in fault
    assert "did you mean 'training'?" in fault


def test_the_docs_are_shipped_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    patterns = project["tool"]["setuptools"]["package-data"]["hfbatch"]
    for path in FOLDER.iterdir():
        assert any(fnmatch(f"docs/{path.name}", pattern) for pattern in patterns), path


# The reference.


@pytest.mark.parametrize(("topic", "kind"), REFERENCES.items())
def test_the_reference_has_every_field_with_its_docstring(topic: str, kind: str) -> None:
    text = spec_reference(kind)
    assert [reported for reported in descriptions(KINDS[kind]) if reported not in text] == []
    assert text in read_topic(topic)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(line.count(" | ") == 3 and not line.endswith("|  |") for line in rows)


def test_types_and_defaults_are_those_of_the_fields() -> None:
    text = spec_reference("job")
    assert "| `task` | string | required |" in text
    assert "| `size` | integer ≥ 1 or `auto` | `auto` |" in text
    assert "| `max_fraction` | number ≥ 0 and ≤ 1 | `0.01` |" in text
    assert "## `input.files`" in text
    assert "## `eval`\n\nHas the same fields as `train`." in spec_reference("finetune")
    assert type_of({}) == "any"


# The JSON Schema.


def test_the_table_of_measures_is_that_of_the_tasks() -> None:
    """But for what it says of engines, which takes a model of each task."""
    text = ENGINES_TOPIC.read_text(encoding="utf8")
    assert measures_table(shown_support(text)) in text, "run: python -m tests.generate"
    assert {name for name, (graphs, _) in shown_support(text).items() if graphs == "yes"} == EXPORTABLE


@pytest.mark.matrix
def test_the_table_of_engines_is_what_the_plan_says() -> None:
    assert shown_support(ENGINES_TOPIC.read_text(encoding="utf8")) == support(), (
        "run: python -m tests.generate"
    )


def test_the_shipped_schema_is_the_generated_one() -> None:
    assert SCHEMA.read_text(encoding="utf8") == schema_text(), "run: python -m tests.generate"
    assert run("schema").stdout == schema_text()
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_one_kind_has_descriptions(kind: str) -> None:
    shown = json.loads(run("schema", kind).stdout)
    assert shown == json_schema(kind)
    assert shown["$schema"].endswith("2020-12/schema")
    assert all(
        "description" in field or "$ref" in field
        for section in [shown, *shown["$defs"].values()]
        for field in section["properties"].values()
    )


def test_an_unknown_kind_of_spec_is_an_error_with_the_near_match() -> None:
    done = run("schema", "jobs")
    assert done.exit_code == 2
    assert "did you mean 'job'?" in " ".join(done.stderr.split())


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_shipped_spec_names_the_schema_and_validates(path: Path) -> None:
    text = path.read_text(encoding="utf8")
    assert text.splitlines()[0] == FIRST
    assert (path.parent / FIRST.partition("$schema=")[2]).resolve() == SCHEMA.resolve()
    VALIDATOR.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "values",
    [
        JOB | {"model": {"name": "org/model"}, "input": {"path": "in/", "files": {"hosts": "a.org"}}},
        JOB | {"input": {"path": "in/", "files": {"roots": ["/a", "/b"], "schemes": "https"}}},
        TRAINING | {"method": "lora", "eval": "dev/"},
        TRAINING | {"method": {"name": "qlora", "bits": 8}, "eval": None},
    ],
)
def test_the_schema_accepts_what_specs_accept(values: dict[str, Any]) -> None:
    KINDS["finetune" if "train" in values else "job"].build(values)
    VALIDATOR.validate(values)


@pytest.mark.parametrize(
    "values",
    [
        JOB | {"tusk": 1},
        JOB | {"batch": {"sise": 1}},
        JOB | {"batch": {"size": 0}},
        JOB | {"model": ""},
        {key: value for key, value in JOB.items() if key != "input"},
        TRAINING | {"input": "in/"},
        TRAINING | {"method": "lara"},
        TRAINING | {"method": {"name": "lora", "ranks": 8}},
    ],
)
def test_the_schema_refuses_what_specs_refuse(values: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(values)
