"""`output.truncated`: a column that says of each prediction whether its row was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import transformers

from hfbatch import SpecError
from hfbatch.cluster import stages
from hfbatch.compute.prepare import POSITION
from hfbatch.compute.worker import Settled, Worker
from hfbatch.data.manifest import Manifest
from hfbatch.data.payload import pack, unpack
from hfbatch.plan import Plan, make_plan
from tests.jobs.tools import make_spec, sentences, write_shards
from tests.models.text import tiny_bert_for


def through_the_stages(plan: Plan) -> tuple[Manifest, Any]:
    """One split through reading, the model and writing, in this process. :returns: its manifest and its part."""
    (split,) = plan.splits
    job = stages.StageJob(
        order=plan.order.to_json(), read=plan.read, inputs=plan.inputs, keep=tuple(plan.keep),
        out=plan.spec.output.path, schema=plan.schema, truncated=plan.spec.output.truncated_column,
        rejects_schema=plan.rejects_schema, stamp={"fingerprint": plan.fingerprint, "commit": "0"}, tracker=None,
    )  # fmt: skip
    manifest = Manifest(split.part)
    row = stages._read({"split": json.dumps(split.to_dict()), "rejects": "[]"}, manifest, job)
    worker = Worker(plan.order)
    worker.settle(Settled(4, "float32", worker.engine.device))
    features = unpack(row["features"])
    made = worker.predict(features.drop_columns([POSITION]))
    outputs = made.outputs.append_column(POSITION, features[POSITION].take(made.kept))
    stages._write({**row, "features": pack(outputs)}, manifest, job)
    return manifest, pq.read_table(Path(plan.spec.output.path) / split.part)


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
    manifest, part = through_the_stages(make_plan(spec))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    expected = [len(tokenizer(text)["input_ids"]) > 24 for text in texts if text is not None]
    name = "truncated" if asked is True else asked
    assert part.column_names[-1] == name
    assert part[name].to_pylist() == expected
    assert 2 < sum(expected) == manifest.rows_truncated < len(expected) - 2
    assert (manifest.rows_out, manifest.rows_rejected) == (21, 1)


def test_without_being_asked_there_is_no_such_column(tmp_path: Path, classifier: str) -> None:
    source = write_shards(tmp_path / "in", sentences(6), shards=1)
    plan = make_plan(make_spec("text-classification", classifier, source, tmp_path / "out"))
    _, part = through_the_stages(plan)
    assert part.column_names == ["id", "text", "label", "score"]
    flagged = make_plan(
        make_spec("text-classification", classifier, source, tmp_path / "new", output={"truncated": True})
    )
    assert flagged.fingerprint != plan.fingerprint


@pytest.mark.parametrize("name", ["id", "score"])
def test_a_name_that_is_taken_is_a_fault(tmp_path: Path, classifier: str, name: str) -> None:
    source = write_shards(tmp_path / "in", sentences(3))
    spec = make_spec("text-classification", classifier, source, tmp_path / "out", output={"truncated": name})
    with pytest.raises(SpecError, match=f"output.truncated: there is a column '{name}' already"):
        make_plan(spec)
