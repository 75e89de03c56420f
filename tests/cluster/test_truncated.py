"""`output.truncated`: a column that says of each prediction whether its row was cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from hfbatch import SpecError
from hfbatch.predict.plan import make_plan
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, read_output, sentences, write_shards
from tests.models.text import tiny_bert_for


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("asked", [True, "was_cut"])
def test_the_rows_that_were_cut_are_the_ones_that_are_longer_than_the_limit(
    tmp_path: Path, task: str, asked: bool | str, classifier: str
) -> None:
    labels = {0: "O", 1: "B-X"}
    model = classifier
    if task == "token-classification":
        model = tiny_bert_for(tmp_path / "model", "TokenClassification", id2label=labels)
    texts: list[str | None] = [*sentences(20, most=3), None, "short"]
    source = write_shards(tmp_path / "in", texts, shards=1)
    spec = make_spec(
        task,
        model,
        source,
        tmp_path / "out",
        batch={"size": 4, "max_length": 24},
        output={"truncated": asked},
    )
    report = job_here(spec).report
    part = read_output(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = [len(tokenizer(text)["input_ids"]) > 24 for text in texts if text is not None]
    name = "truncated" if asked is True else asked
    assert part.column_names[-1] == name
    assert part[name].to_pylist() == expected
    rows = report["rows"]
    assert 2 < sum(expected) == rows["truncated"] < len(expected) - 2
    assert (rows["out"], rows["rejected"]) == (21, 1)


def test_without_being_asked_there_is_no_such_column(tmp_path: Path, classifier: str) -> None:
    source = write_shards(tmp_path / "in", sentences(6), shards=1)
    spec = make_spec("text-classification", classifier, source, tmp_path / "out")
    plan = make_plan(spec)
    job_here(spec)
    part = read_output(tmp_path / "out")
    assert part.column_names == ["id", "text", "label", "score"]
    flagged = make_plan(
        make_spec("text-classification", classifier, source, tmp_path / "new", output={"truncated": True})
    )
    assert flagged.fingerprint != plan.fingerprint


@pytest.mark.parametrize("name", ["id", "score"])
def test_a_name_that_is_taken_is_a_fault(tmp_path: Path, classifier: str, name: str) -> None:
    source = write_shards(tmp_path / "in", sentences(3))
    spec = make_spec("text-classification", classifier, source, tmp_path / "out", output={"truncated": name})
    with pytest.raises(SpecError, match=f"output.truncated: column '{name}' exists already"):
        make_plan(spec)
