"""The README tells the truth: its commands exist, its spec and its Python work, its lists are complete."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import hfbatch
from hfbatch import cli, options
from hfbatch.catalogue import describe_task, list_tasks
from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.spec import JobSpec, Section, Spec, read_yaml
from hfbatch.tasks import task_class
from hfbatch.train.recipes import recipe_class

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
PACKAGE = Path(hfbatch.__file__).parent


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


SPECS = list(zip(blocks("yaml"), (JobSpec, FinetuneSpec), strict=True))
"""The specs that are shown whole, and what they are of."""


def shell_commands() -> Iterator[list[str]]:
    """Every command as words: the lines of shell blocks at `&&`, and what stands between backticks."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?$", "", README, flags=re.MULTILINE))
    for text in [*lines, *(span for span in spans if re.match(r"(\S*/)?hfbatch ", span))]:
        words = shlex.split(text, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def hfbatch_commands() -> list[list[str]]:
    """What follows `hfbatch` in each command, also where Ray is given the command."""
    found = []
    for words in shell_commands():
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words and Path(words[0]).name == "hfbatch" and words[1:] not in found:
            found.append(words[1:])
    return found


def spec_of(name: str, values: dict[str, Any]) -> Spec | None:
    """The spec that parsed arguments mean, for the commands that take one."""
    what = [str(word) for word in values.get("what", [])]
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
    if "train" in start:
        flags = [values[key] for key in ("column", "param", "set_", "limit")]
        return options.finetune_spec(start, *flags, None)
    flags = [values[key] for key in ("column", "keep", "param", "set_", "limit")]
    return options.job_spec(start, *flags, None)


def fields_of(model: type[Section]) -> dict[str, Any]:
    """Names of a spec's fields, nested as its sections are."""
    sections = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: fields_of(kind) if isinstance(kind, type) and issubclass(kind, Section) else None
        for name, kind in sections.items()
    }


def nested(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The same for a spec's values; options of a task and mapped columns are values."""
    return {
        name: nested(value, fields[name]) if isinstance(value, dict) and fields.get(name) else None
        for name, value in values.items()
    }


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
    if name == "tasks" and values["name"]:
        describe_task(values["name"])


def test_every_command_is_shown():
    shown = {words[0] for words in hfbatch_commands()}
    assert shown == set(typer.main.get_command(cli.app).commands)


def test_every_flag_in_the_text_is_one_of_a_command():
    commands = typer.main.get_command(cli.app).commands.values()
    known = {flag for command in commands for option in command.params for flag in option.opts} | {"--help"}
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(--[^`\n]+)`", prose)
    assert named
    words = [word for span in named for word in shlex.split(span)]
    assert {word for word in words if word.startswith("-")} <= known
    for flag, override in pairwise(words):
        if flag == "--set":
            training = override.split(".")[0] not in JobSpec.model_fields or override.startswith(
                "model.overrides"
            )
            kind, spec = (FinetuneSpec, "finetune") if training else (JobSpec, "embed")
            assert kind.load(ROOT / f"jobs/{spec}.yaml", [override])


@pytest.mark.parametrize(("block", "kind"), SPECS)
def test_the_spec_loads_and_shows_every_field_with_a_comment(block, kind):
    values = yaml.safe_load(block)
    spec = kind.build(values)
    knower = task_class(spec.task) if kind is JobSpec else recipe_class(spec.task)
    knower.Params.model_validate(spec.params)
    assert nested(values, fields_of(kind)) == fields_of(kind)
    assert [line for line in block.splitlines() if " # " not in line] == []


@pytest.mark.parametrize(("block", "kind"), SPECS)
def test_a_field_that_differs_from_its_default_says_so(block, kind):
    spec, sections = kind.build(yaml.safe_load(block)), []
    for line in block.splitlines():
        key = line.split(":")[0].strip()
        del sections[(len(line) - len(line.lstrip())) // 2 :]
        holder = attrgetter(".".join(sections))(spec) if sections else spec
        field, value = type(holder).model_fields[key], getattr(holder, key)
        sections.append(key)
        if field.is_required() or line.split("#")[0].rstrip().endswith(":"):
            continue
        assert (value == field.default) != ("(default:" in line), line


@pytest.mark.parametrize("block", blocks("python"))
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


def test_the_table_of_tasks_is_what_the_command_lists():
    def code(names):
        return ", ".join(f"`{name}`" for name in names)

    expected = [
        f"| `{task['name']}` | {task['summary']} | {code(column['name'] for column in task['inputs'])} "
        f"| {code(task['outputs'])} | "
        for task in list_tasks()
    ]
    section = README.split("\n## Tasks\n")[1].split("\n## ")[0]
    found = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_the_smallest_task_file_is_shown_whole():
    (shown,) = blocks("py")
    files = [path for path in (PACKAGE / "tasks").glob("*.py") if path.name not in ("__init__.py", "base.py")]
    assert min(map(len, (path.read_text(encoding="utf8").splitlines() for path in files))) == len(
        shown.splitlines()
    )
    assert shown.strip() in {path.read_text(encoding="utf8").strip() for path in files}


def test_the_list_of_files_names_every_module_and_nothing_else():
    (block,) = (block for block in blocks("text") if block.startswith("hfbatch/ "))
    folder, listed = "", []
    for line in block.splitlines()[1:]:
        name = line.split()[0]
        assert len(line.split()) > 1, f"{name} is not described"
        if not line.startswith("    "):
            folder = name if name.endswith("/") else ""
        listed.append(name if name == folder else folder + name)
    files = [path.relative_to(PACKAGE) for pattern in ("*.py", "*.j2") for path in PACKAGE.rglob(pattern)]
    there = {str(path).replace("__init__.py", "") for path in files} - {""}
    assert sorted(listed) == sorted(there)


def test_every_file_and_test_that_is_named_is_there():
    table = (ROOT / "tests/README.md").read_text(encoding="utf8")
    for path, _, test in re.findall(r"`((?:tests|jobs)/[\w/]+\.\w+)(::(\w+))?`", README + table):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf8"), test


def test_the_set_up_commands_are_one_line_each_and_ci_installs_with_them():
    demo, tests = (block.strip() for block in blocks("bash") if block.startswith("python3 -m venv"))
    venv = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e "
    assert demo == venv + "'.[demo]' && .venv/bin/hfbatch demo"
    assert tests == venv + "'.[demo,test]' && .venv/bin/pytest -n 2 --dist loadfile"
    script = (ROOT / ".ci/run").read_text(encoding="utf8")
    steps = [line.removeprefix("step ") for line in script.splitlines() if line.startswith("step ")]
    plain = [
        step.replace('"$venv/bin/', ".venv/bin/").replace('"${PYTHON:-python3}"', "python3") for step in steps
    ]
    plain = [step.replace('"$venv"', ".venv").replace('"', "").replace(" -q", "") for step in plain]
    wanted = tests.split(" && ")
    assert plain[:2] == wanted[:2]
    assert plain[-1] == f"{wanted[2]} $@"
