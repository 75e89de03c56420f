"""The spec: every fault at once, each with its place and what exists there."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec, is_training
from hfbatch.spec.job import JobSpec, apply_overrides, parse_value

LEAST = {"task": "embedding", "model": "org/model", "input": "in/", "output": "out/"}


def faults_of(values: dict[str, object]) -> str:
    with pytest.raises(SpecError) as caught:
        JobSpec.build(values)
    return "\n".join(caught.value.faults)


def test_plain_strings_stand_for_name_and_paths() -> None:
    spec = JobSpec.build(LEAST)
    assert (spec.model.name, spec.input.path, spec.output.path) == ("org/model", "in/", "out/")
    assert spec.batch.size == "auto"


def test_all_faults_come_together() -> None:
    faults = faults_of({**LEAST, "model": {"nam": "x"}, "batch": {"size": 0}, "worker": {}})
    assert "unknown key 'model.nam' (known here: name, file, revision, dtype, trust_remote_code)" in faults
    assert "model.name is missing" in faults
    assert "batch.size" in faults
    assert "unknown key 'worker'" in faults
    assert "did you mean 'workers'?" in faults


def test_a_key_in_the_wrong_place_is_reported_with_the_right_one() -> None:
    faults = faults_of({**LEAST, "split_rows": 9, "batch": {"seed": 1, "max_lenght": 3}})
    assert "unknown key 'split_rows'" in faults
    assert "did you mean 'input.split_rows'?" in faults
    assert "unknown key 'batch.seed'" in faults
    assert "did you mean 'seed'?" in faults
    assert "did you mean 'batch.max_length'?" in faults


def test_a_key_with_nothing_behind_it_is_one_left_out() -> None:
    assert JobSpec.build({**LEAST, "params": None, "batch": {"size": None}}) == JobSpec.build(LEAST)
    assert "input" in faults_of({**LEAST, "input": None})


def test_choices_that_exclude_each_other_are_reported_together() -> None:
    values = {"task": "text-classification", "model": "org/model", "train": "in/", "output": "out/"}
    clash = {"loop": "accelerate", "compute": {"compile": True}, "workers": {"at_least": 3, "count": 2}}
    with pytest.raises(SpecError) as caught:
        FinetuneSpec.build({**values, **clash})
    assert [fault.split(";")[0] for fault in caught.value.faults] == [
        "loop accelerate supports neither compute.compile nor workers.strategy fsdp",
        "workers.at_least 3 is more than workers.count 2",
    ]


def test_an_engine_is_a_name_or_a_section_and_has_an_alias() -> None:
    forms = ["continuous", {"name": "continuous"}]
    specs = [JobSpec.build({**LEAST, "engine": form}) for form in forms]
    specs += [JobSpec.build({**LEAST, "batch": {"continuous": true}}) for true in (True, "yes")]
    assert {spec.engine.name for spec in specs} == {"continuous"}
    assert all(JobSpec.build(spec.model_dump()) == spec for spec in specs)
    assert all(JobSpec.build(yaml.safe_load(spec.to_yaml())) == spec for spec in specs)
    for other in ({}, {"engine": None}, {"batch": {"continuous": False}}, {"batch": {"continuous": None}}):
        assert JobSpec.build({**LEAST, **other}).engine.name == "torch"
    over = apply_overrides(LEAST, ["engine.quantization=int8"])
    assert (
        JobSpec.build(over).engine
        == JobSpec.build({**LEAST, "engine": {"name": "torch", "quantization": "int8"}}).engine
    )
    over = apply_overrides({**LEAST, "engine": "torch"}, ["engine.name=continuous"])
    assert JobSpec.build(over).engine.name == "continuous"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"engine": "tensorrt"}, "engine.name: 'tensorrt' is none of: 'torch', 'continuous'"),
        (
            {"engine": {"name": "auto", "guard": "skip"}},
            "engine: auto chooses by the comparison with float32",
        ),
        ({"engine": {"quantization": "int9"}}, "engine.quantization: Input should be 'none', 'int8'"),
        (
            {"engine": {"name": "torch", "nam": 1}},
            "unknown key 'engine.nam' (known here: threads, guard, name, quantization, compile, packing, device_map, memory); did you mean 'engine.name'",
        ),
        (
            {"engine": "torch", "batch": {"continuous": True}},
            "batch.continuous true contradicts engine torch; leave batch.continuous out",
        ),
        (
            {"engine": "continuous", "batch": {"continuous": False}},
            "batch.continuous false contradicts engine continuous; leave batch.continuous out",
        ),
        (
            {"batch": {"continuous": "maybe"}, "engine": "torch"},
            "batch.continuous: Input should be a valid bool",
        ),
    ],
)
def test_faults_of_an_engine_name_the_fix(given: dict[str, object], fault: str) -> None:
    assert faults_of({**LEAST, **given}).startswith(fault)


@pytest.mark.parametrize("key", ["training", "trian", "train_data"])
def test_a_misspelt_train_makes_no_job_of_a_training(key: str) -> None:
    values = {"task": "text-classification", "model": "org/model", key: "in/", "output": "out/"}
    assert is_training(values)
    assert not is_training(LEAST)
    with pytest.raises(SpecError, match="did you mean 'train'"):
        FinetuneSpec.build(values)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        JobSpec.build(LEAST).seed = 1  # type: ignore[misc]


def test_yaml_round_trip_keeps_what_was_set(tmp_path: Path) -> None:
    spec = JobSpec.build({**LEAST, "params": {"top_k": 2}, "input": {"path": "in/", "filter": "lang = 'en'"}})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    assert JobSpec.load(tmp_path / "spec.yaml") == spec


def test_overrides_reach_below_shorthands() -> None:
    values = apply_overrides(
        LEAST, ["model.dtype=float32", "batch.size=64", "input.columns.text=body", "seed=7"]
    )
    spec = JobSpec.build(values)
    assert (spec.model.name, spec.model.dtype, spec.batch.size, spec.seed) == ("org/model", "float32", 64, 7)
    assert spec.input.columns == {"text": "body"}
    assert LEAST["model"] == "org/model"


@pytest.mark.parametrize("override", ["batch.size", "task.x=1"])
def test_an_override_that_cannot_work_says_why(override: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        apply_overrides(LEAST, [override])


def test_a_spec_file_that_is_none_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        JobSpec.load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(SpecError, match="holds a list"):
        JobSpec.load(tmp_path / "list.yaml")
    (tmp_path / "python.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(SpecError, match="is not YAML"):
        JobSpec.load(tmp_path / "python.yaml")


@settings(deadline=None)
@given(st.text())
def test_any_text_is_some_value(text: str) -> None:
    value = parse_value(text)
    assert value is None or type(value) in (str, int, float, bool, list, dict, set, bytes, date, datetime)


@settings(deadline=None)
@given(st.integers(1, 10_000), st.one_of(st.none(), st.integers(1, 512)), st.floats(0, 1))
def test_any_valid_spec_survives_yaml(size: int, length: int | None, share: float) -> None:
    values = {**LEAST, "batch": {"size": size, "max_length": length}, "rejects": {"max_fraction": share}}
    spec = JobSpec.build(values)
    assert JobSpec.build(yaml.safe_load(spec.to_yaml())) == spec
