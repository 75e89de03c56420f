"""Specs are plain values: what YAML can do beyond that is refused at once, in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfbatch.errors import SpecError
from hfbatch.spec.job import JobSpec, apply_overrides, read_yaml
from hfbatch.spec.plain_yaml import MOST_BYTES, MOST_LEVELS, load

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
MERGES = "a0: &a0 {x: [1, 1]}\n" + "".join(
    f"a{k}: &a{k} {{p: *a{k - 1}, q: *a{k - 1}}}\n" for k in range(1, 40)
)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (BOMB, "more than 100,000 values, those of its aliases counted"),
        (MERGES, "more than 100,000 values"),
        ("params: &a {x: [*a]}", "*a is used inside of the value that it names (line 1)"),
        ("[" * 500_000, f"nested deeper than {MOST_LEVELS} levels"),
        ("".join(f"{' ' * k}a:\n" for k in range(400)), f"nested deeper than {MOST_LEVELS} levels (line 50)"),
        ("? " * 5000, f"nested deeper than {MOST_LEVELS} levels"),
        ("x" * (MOST_BYTES + 1), "larger than 1,048,576 bytes"),
        ("ü" * MOST_BYTES, "larger than 1,048,576 bytes"),
        ("task: a\nmodel: b\ntask: c", "key 'task' comes twice, in lines 1 and 3"),
        ("params: {a: 1, 'a': 2}", "key 'a' comes twice"),
        ("params: {threshold: .nan}", ".nan is not a finite number (line 1)"),
        ("params: {threshold: -.inf}", "-.inf is not a finite number"),
        ("params: {threshold: 1.0e+999}", "1.0e+999 is not a finite number"),
        ("task: !!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
        ("task: !!binary aGk=", "could not determine a constructor for the tag"),
        ("task: !mine x", "could not determine a constructor for the tag '!mine'"),
        ("[a, b]", "holds a list, not keys"),
    ],
)  # fmt: skip
def test_what_is_no_plain_value_is_refused_in_one_sentence(text: str, reported: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(text, encoding="utf8")
    with pytest.raises(SpecError) as error:
        read_yaml(spec)
    (fault,) = error.value.faults
    assert reported in fault
    assert "\n" not in fault
    assert str(spec) in fault


def test_a_spec_that_is_not_utf8_or_has_no_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(b"task: \xff")
    with pytest.raises(SpecError, match="not YAML in UTF-8"):
        read_yaml(tmp_path / "spec.yaml")
    with pytest.raises(SpecError):
        read_yaml("/dev/zero")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-01-01", "2026-01-01"), ("{a: 1, b: [x, null, yes, 1.5]}", {"a": 1, "b": ["x", None, True, 1.5]}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}), ("", None),
    ],
)  # fmt: skip
def test_plain_values_are_read(text: str, value: Any) -> None:
    assert load(text) == value


def test_a_list_of_many_labels_is_no_bomb() -> None:
    assert len(load(f"[{', '.join(['label'] * 2000)}]")) == 2000


def test_flags_are_read_in_the_same_way() -> None:
    values = {"task": "embedding", "model": "m", "input": "in", "output": "out"}
    for text in ("a: 1\na: 2", "{a: .nan}", "[" * 60 + "]" * 60):
        with pytest.raises(SpecError, match=r"--set params\.x: "):
            apply_overrides(values, [f"params.x={text}"])
    for text in ("a: b: c", "!mine x", "[unclosed", "%d"):  # no YAML: a plain text
        assert apply_overrides(values, [f"params.x={text}"])["params"]["x"] == text
    with pytest.raises(SpecError, match=r"rejects\.max_fraction"):
        JobSpec.build(apply_overrides(values, ["rejects.max_fraction=nan"]))
