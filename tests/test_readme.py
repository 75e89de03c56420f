"""README and docs are correct: their commands exist, their specs and Python work, their lists are complete."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml

from hfbatch.cli import app as cli
from hfbatch.cli import options
from hfbatch.cli.catalogue import describe_task
from hfbatch.cli.docs import list_topics, read_topic
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import load_model
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec, Spec, read_yaml
from hfbatch.spec.schema import KINDS
from hfbatch.tasks import TASKS, task_class
from hfbatch.train.recipes import recipe_class
from tests.generate import ROOT, tasks_table, with_table
from tests.layers import ROOMS
from tests.layers import ROOT as PACKAGE

README = (ROOT / "README.md").read_text(encoding="utf8")
DOCS = {topic["topic"]: read_topic(topic["topic"]) for topic in list_topics()}
TEXTS = {"README": README, **DOCS}
"""README and docs, with what is generated, by their names."""
MOST_LINES = 250
"""Of the README."""


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks of a language in a text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def all_blocks(language: str) -> list[Any]:
    """The fenced blocks of a language in README and docs, as parameters of a test."""
    return [pytest.param(block, id=name) for name, text in TEXTS.items() for block in blocks(language, text)]


def prose_of(text: str) -> str:
    """A text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> Iterator[list[str]]:
    """Every command as words: the lines of shell blocks at `&&`, and what stands between backticks."""
    lines = [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", prose_of(text))
    for text in [*lines, *(span for span in spans if re.match(r"(\S*/)?hfbatch ", span))]:
        words = shlex.split(text, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def hfbatch_commands() -> list[list[str]]:
    """What follows `hfbatch` in each command, also where Ray is given the command."""
    found = []
    for words in (words for text in TEXTS.values() for words in shell_commands(text)):
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words and Path(words[0]).name == "hfbatch" and words[1:] not in found:
            found.append(words[1:])
    return found


def spec_of(name: str, values: dict[str, Any]) -> Spec | None:
    """The spec that parsed arguments mean, for the commands that take one."""
    what = [str(word) for word in values.get("what", [])]
    if name == "serve":
        given = [values[key] for key in ("model", "host", "port", "param", "set_")]
        return options.serve_specs(
            [word if word.count(".") == 0 else str(ROOT / word) for word in what], *given
        )[0]
    if name == "run" or len(what) == 1:
        start = read_yaml(ROOT / (what[0] if what else values["spec"]))
    elif name == "finetune":
        start = {key: values[key] for key in ("task", "model", "train", "output")}
        start |= {"eval": values["eval_"]} if values["eval_"] else {}
    elif name in ("predict", "embed") or what:
        task, source, out = what or [values.get("task", "embedding"), values["input_"], values["output"]]
        start = {"task": task, "model": values["model"], "input": source, "output": out}
    else:
        return None
    flags = [values.get(key) for key in ("column", "keep", "param", "set_", "limit")]
    return options.any_spec(start, *flags, None)


@pytest.mark.parametrize("words", hfbatch_commands(), ids=" ".join)
def test_a_command_exists_with_these_flags_and_means_a_spec(words):
    name, *rest = words
    command = typer.main.get_command(cli.app).commands[name]
    values = command.make_context(name, rest).params
    spec = spec_of(name, values)
    if isinstance(spec, JobSpec):
        task_class(spec.task).Params.model_validate(spec.params)
        assert set(spec.input.columns) <= {column.name for column in task_class(spec.task).inputs}
    if isinstance(spec, FinetuneSpec):
        recipe_class(spec.task).Params.model_validate(spec.params)
        assert set(spec.train.columns) <= {column.name for column in recipe_class(spec.task).columns}
    if name == "tasks" and values["name"] not in (None, "NAME"):
        describe_task(values["name"])
    if name == "docs" and values["topic"]:
        assert values["topic"] in DOCS
    if name == "schema" and values["kind"]:
        assert values["kind"] in KINDS


def test_every_command_is_shown():
    shown = {words[0] for words in hfbatch_commands()}
    assert shown == set(typer.main.get_command(cli.app).commands)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_flag_in_the_text_is_one_of_a_command(text):
    commands = typer.main.get_command(cli.app).commands.values()
    known = {flag for command in commands for option in command.params for flag in option.opts} | {"--help"}
    named = re.findall(r"`(--[^`\n]+)`", prose_of(text))
    words = [word for span in named for word in shlex.split(span)]
    assert {word for word in words if word.startswith("-")} <= known
    for flag, override in pairwise(words):
        if flag == "--set":
            training = re.split(r"[.=]", override)[0] not in JobSpec.model_fields or override.startswith(
                "model.overrides"
            )
            kind, spec = (FinetuneSpec, "finetune") if training else (JobSpec, "embed")
            assert kind.load(ROOT / f"jobs/{spec}.yaml", [override])


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_a_spec_loads_and_its_task_has_its_params(block):
    spec = options.any_spec(yaml.safe_load(block), *[None] * 6)
    knower = task_class(spec.task) if isinstance(spec, JobSpec) else recipe_class(spec.task)
    knower.Params.model_validate(spec.params)


@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_compiles_and_its_names_exist(block):
    tree = ast.parse(block)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
                top = alias.name.partition(".")[0]
                known[alias.asname or top] = import_module(alias.name if alias.asname else top)
    assert known
    for node in ast.walk(tree):
        names = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else [""]
        if names[0] in known and all(name.isidentifier() for name in names):
            found = known[names[0]]
            for name in names[1:]:
                assert hasattr(found, name), ".".join(names)
                found = getattr(found, name)


def test_the_readme_is_short_and_its_table_of_tasks_is_current():
    assert len(README.splitlines()) <= MOST_LINES
    assert with_table(README, tasks_table()) == README, "run: python -m tests.generate"
    assert tasks_table() in README


def test_two_task_files_are_shown_whole_and_one_is_the_smallest():
    shown, own = blocks("py", DOCS["extending"])
    files = [path for path in (PACKAGE / "tasks").glob("*/*.py") if path.stem.replace("_", "-") in TASKS]
    assert min(map(len, (path.read_text(encoding="utf8").splitlines() for path in files))) == len(
        shown.splitlines()
    )
    assert {shown, own} <= {path.read_text(encoding="utf8") for path in files}


def test_the_engine_that_is_shown_whole_runs_a_batch(encoder, monkeypatch):
    def load(folder, auto_class, dtype, threads):
        return load_model(EngineConfig(folder, auto_class, dtype), torch.float32)

    monkeypatch.setitem(sys.modules, "some_package", SimpleNamespace(load=load))
    code = next(block for block in blocks("text", DOCS["extending"]) if "class SomeEngine" in block)
    shown: dict[str, Any] = {}
    exec(compile(code, "some.py", "exec"), shown)
    engine = shown["SomeEngine"](EngineConfig(encoder, "AutoModel", "float32"))
    batch = {"input_ids": np.arange(5, 21).reshape(2, 8)}
    found = engine.collect(
        engine.submit(batch, lambda model, inputs: {"first": model(**inputs).last_hidden_state[:, 0]})
    )
    assert {name: values.shape for name, values in found.items()} == {
        "first": (2, engine.model.config.hidden_size)
    }
    assert not engine.is_out_of_memory(ValueError())


def test_every_room_is_listed_in_its_order():
    (block,) = (block for block in blocks("text", README) if block.startswith("hfbatch/\n"))
    listed = [line.split(maxsplit=1) for line in block.splitlines()[1:]]
    assert all(len(line) == 2 for line in listed)
    assert [name for name, _ in listed[-2:]] == ["docs/", "errors.py"]
    names = [name.removesuffix("/").replace("/", ".") for name, _ in listed[:-2]]
    assert sorted(names) == sorted(room for room in ROOMS if room)
    outer = [name for name in names if "." not in name]
    assert outer == [room for room in ROOMS if room and "." not in room]


def test_every_file_and_test_that_is_named_is_there():
    texts = "\n".join([*TEXTS.values(), (ROOT / "tests/README.md").read_text(encoding="utf8")])
    for path, _, test in re.findall(r"`((?:tests|jobs|hfbatch)/[\w/]+\.[\w.]+)(::(\w+))?`", texts):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf8"), test


def test_the_set_up_commands_are_one_line_each_and_ci_installs_with_them():
    demo, tests = (block.strip() for block in blocks("bash", README) if block.startswith("python3 -m venv"))
    venv = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e "
    assert demo == venv + "'.[demo]' && .venv/bin/hfbatch demo"
    assert tests == venv + "'.[demo,test]' && .venv/bin/pytest -n 2 --dist loadgroup"
    script = (ROOT / ".ci/run").read_text(encoding="utf8")
    steps = [line.removeprefix("step ") for line in script.splitlines() if line.startswith("step ")]
    plain = [
        step.replace('"$venv/bin/', ".venv/bin/").replace('"${PYTHON:-python3}"', "python3") for step in steps
    ]
    plain = [step.replace('"$venv"', ".venv").replace('"', "").replace(" -q", "") for step in plain]
    wanted = tests.split(" && ")
    assert plain[:2] == wanted[:2]
    assert plain[-1] == f"{wanted[2]} $@"
