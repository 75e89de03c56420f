"""`task: auto` and tasks that a model cannot do, as the plan reports them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfbatch import SpecError
from hfbatch.predict.plan import make_plan
from tests.jobs.tools import call, make_spec, sentences, write_shards
from tests.models.text import tiny_t5


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", sentences(4))


def test_auto_is_planned_as_the_task_that_it_means(tmp_path: Path, source: Path, classifier: str) -> None:
    auto = make_plan(make_spec("auto", classifier, source, tmp_path / "out"))
    named = make_plan(make_spec("text-classification", classifier, source, tmp_path / "out"))
    assert auto.notes == [
        "task text-classification, inferred from BertForSequenceClassification",
        *named.notes,
    ]
    assert (auto.spec, auto.fingerprint) == (named.spec, named.fingerprint)


def test_a_name_with_languages_is_planned_as_translation_with_params(tmp_path: Path, source: Path) -> None:
    model = tiny_t5(tmp_path / "t5", task_specific_params={"translation_en_to_de": {"prefix": "to German: "}})
    plans = [
        make_plan(make_spec(task, model, source, tmp_path / "out", **more))
        for task, more in (
            ("translation_en_to_de", {}),
            ("auto", {}),
            ("translation", {"params": {"src_lang": "en", "tgt_lang": "de"}}),
        )
    ]
    assert {plan.fingerprint for plan in plans} == {plans[0].fingerprint}
    assert all("prepends 'to German: ' to each row" in plan.notes for plan in plans)


def test_a_task_that_the_model_cannot_do_is_one_fault_among_all(
    tmp_path: Path, source: Path, classifier: str
) -> None:
    spec = make_spec("text-generation", classifier, source, tmp_path / "out", output={"keep": ["ident"]})
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    fit, keep = sorted(caught.value.faults)[::-1]
    assert (
        "(BertForSequenceClassification) does not support text-generation; it supports: text-class"
        in keep + fit
    )
    assert "output.keep: column 'ident' not in input" in keep + fit


def test_auto_without_a_model_speaks_of_the_model_alone(tmp_path: Path, source: Path) -> None:
    with pytest.raises(SpecError) as caught:
        make_plan(make_spec("auto", "/no/model", source, tmp_path / "out"))
    (fault,) = caught.value.faults
    assert "/no/model" in fault


def test_params_that_lack_are_reported_once(tmp_path: Path, source: Path, classifier: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_plan(make_spec("zero-shot-image-classification", classifier, source, tmp_path / "out"))
    (fault,) = caught.value.faults
    assert fault.startswith("params.candidate_labels is missing")


def test_the_command_takes_auto_and_says_which_task_it_means(
    tmp_path: Path, source: Path, classifier: str
) -> None:
    done = call(
        "predict", "auto", str(source), str(tmp_path / "out"), "-m", classifier, "--dry-run", "--json"
    )
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["task"] == "text-classification"
    assert "inferred from BertForSequenceClassification" in plan["notes"][0]
