"""`hfbatch preview`: what a job would give for its first rows, without Ray and without an output."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch import SpecError
from hfbatch.predict.preview import preview
from tests.jobs.here import job_here
from tests.jobs.poison import poison_model
from tests.jobs.tools import call, make_spec, read_output, sentences, write_shards


def test_rows_are_those_of_the_job(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(12), shards=1)
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out")
    found = preview(spec, 4)
    assert not (tmp_path / "out").exists()
    assert [one["row"] for one in found.rows] == [0, 1, 2, 3]
    assert job_here(spec).exit_code == 0
    expected = read_output(tmp_path / "out")["embedding"].to_pylist()[:4]
    for one, vector in zip(found.rows, expected, strict=True):
        assert one["output"]["embedding"] == pytest.approx(vector, abs=1e-6)
    assert set(found.seconds) == {"plan", "read", "load", "preprocess", "predict", "postprocess"}


def test_a_command_shows_inputs_beside_outputs(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a preview has no use for Ray"))
    write_shards(tmp_path / "in", ["a river", "[bold]not markup[/bold]", "b"], shards=1)
    arguments = ["preview", "embedding", str(tmp_path / "in"), "-m", encoder, "--rows", "2"]
    shown = call(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "a river" in shown.output
    assert "[bold]not markup[/bold]" in shown.output
    assert "32 items" in shown.output
    values = json.loads(call(*arguments, "--json").stdout)
    assert [one["input"]["text"] for one in values["rows"]] == ["a river", "[bold]not markup[/bold]"]
    assert len(values["rows"][0]["output"]["embedding"]) == 32
    spec = tmp_path / "job.yaml"
    spec.write_text(make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out").to_yaml())
    assert json.loads(call("preview", str(spec), "--json").stdout)["rows"][2]["input"] == {"text": "b"}


def test_rejects_come_with_their_traceback(tmp_path: Path) -> None:
    model = poison_model(tmp_path / "model", raises="dawn")
    write_shards(tmp_path / "in", ["a river", "at dawn", None], shards=1)
    spec = make_spec("embedding", model, tmp_path / "in", tmp_path / "out", model={"trust_remote_code": True})
    found = preview(spec)
    assert [(one["row"], one["stage"], one["message"]) for one in found.rejects] == [
        (1, "forward", "the model does not take this word"),
        (2, "preprocess", "text is null"),
    ]
    assert "Traceback (most recent call last)" in found.rejects[0]["traceback"]
    assert [one["row"] for one in found.rows] == [0]


def test_faults_of_the_spec_and_an_input_without_rows(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", ["a"])
    wrong = call("preview", "embedding", str(tmp_path / "in"), "-m", encoder, "--column", "text=none")
    assert wrong.exit_code == 2
    assert "column 'none' not in input" in wrong.output
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", input={"filter": "id > 5"})
    with pytest.raises(SpecError, match="has no rows"):
        preview(spec)
    (tmp_path / "train.yaml").write_text("task: text-classification\nmodel: m\ntrain: in\noutput: out\n")
    assert (
        "is a fine-tuning spec, which has no preview" in call("preview", str(tmp_path / "train.yaml")).output
    )


def test_a_filter_that_leaves_few_rows(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(50), "text": sentences(50)}), tmp_path / "in" / "a.parquet")
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", input={"filter": "id % 20 = 7"})
    assert [one["row"] for one in preview(spec).rows] == [7, 27, 47]
