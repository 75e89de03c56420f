"""Flags become a spec, and each kind of spec goes to its own code."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hfbatch.cli import options, predict
from hfbatch.cli.app import COMMANDS, app
from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.spec.job import JobSpec

JOB = {"task": "embedding", "model": "org/model", "input": "in/", "output": "out/"}
TRAINING = {"task": "embedding", "model": "org/model", "train": "in/", "output": "out/"}
NONE = (None,) * 6
"""No flags."""


def test_all_builders_of_specs_take_the_same_parameters() -> None:
    taken = [
        list(inspect.signature(build).parameters)
        for build in (options.any_spec, options.job_spec, options.finetune_spec)
    ]
    assert taken[0] == taken[1] == taken[2]


def test_the_kind_of_a_spec_is_found_by_its_keys() -> None:
    assert isinstance(options.any_spec(JOB, *NONE), JobSpec)
    assert isinstance(options.any_spec(TRAINING, *NONE), FinetuneSpec)
    with pytest.raises(SpecError, match="did you mean 'train'"):
        options.any_spec({"task": "embedding", "model": "m", "trian": "in/", "output": "out/"}, *NONE)


def test_flags_apply_to_the_spec(tmp_path: Path) -> None:
    saved = tmp_path / "job.yaml"
    spec = options.job_spec(JOB, ["text=body"], ["id"], ["pooling=cls"], ["batch.size=8"], 5, saved)
    assert spec.input.columns == {"text": "body"}
    assert (spec.output.keep, spec.params, spec.batch.size) == (("id",), {"pooling": "cls"}, 8)
    assert spec.input.limit == 5
    assert JobSpec.load(saved) == spec
    training = options.finetune_spec(TRAINING | {"eval": "dev/"}, ["anchor=a"], None, None, None, 5, None)
    assert training.eval is not None
    assert training.train.columns == training.eval.columns == {"anchor": "a"}
    assert (training.train.limit, training.eval.limit) == (5, None)


def test_keep_is_refused_for_fine_tuning() -> None:
    with pytest.raises(SpecError, match="remove --keep"):
        options.any_spec(TRAINING, None, ["id"], None, None, None, None)


@pytest.mark.parametrize(
    ("command", "values", "called"),
    [
        (["run", "--dry-run"], JOB, "_start"),
        (["run", "--dry-run"], TRAINING, "start_training"),
        (["plan"], JOB, "_show_plan"),
        (["plan"], TRAINING, "plan_training"),
    ],
)
def test_run_and_plan_take_both_kinds(
    command: list[str], values: dict[str, Any], called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    for name in ("_start", "start_training", "_show_plan", "plan_training"):
        monkeypatch.setattr(predict, name, lambda spec, *_, name=name: calls.append((name, spec)))
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf8")
    done = CliRunner().invoke(app, [*command, str(path), "--set", "seed=7"])
    assert done.exit_code == 0, done.output
    ((name, spec),) = calls
    assert name == called
    assert spec.seed == 7


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["a", "b"], "plan takes 1 argument or 3, not 2"),
        (["embedding", "in/", "out/"], "--model is missing"),
    ],
)
def test_other_arguments_of_plan_are_refused(arguments: list[str], fault: str) -> None:
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert fault in done.stderr


def test_every_command_has_an_example() -> None:
    for command in COMMANDS:
        lines = str(command.__doc__).splitlines()
        assert any(
            line.startswith(f"    Example: hfbatch {command.__name__.replace('_', '-')}") for line in lines
        )
