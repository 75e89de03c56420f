"""An output of other results is not gone on with: it is complete and stays, or is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hfbatch
from hfbatch.errors import SpecError, WorkerError
from hfbatch.output.manifest import Manifest
from hfbatch.output.results_version import CHANGES, RESULTS_VERSION
from hfbatch.output.sinks.parquet import PartWriter
from hfbatch.predict.plan import Plan, look_again, make_plan
from hfbatch.predict.verify import verify_output
from hfbatch.runtime import runner
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.plan import make_finetune_plan
from tests.jobs.tools import make_spec, sentences, write_shards

OLD = {"hfbatch": "0.0.9"}


@pytest.fixture
def plan(encoder: str, tmp_path: Path) -> Plan:
    write_shards(tmp_path / "in", sentences(12), shards=2)
    return make_plan(
        make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", input={"split_rows": 6})
    )


def leave(plan: Plan, parts: int, version: int | None) -> dict[str, Any]:
    """Leaves the first parts of a job whose identity has that version, as a job would. :returns: job.json."""
    plan.identity = {name: value for name, value in plan.identity.items() if name != "results"}
    if version is not None:
        plan.identity["results"] = version
    writer = PartWriter(
        plan.spec.output.path, plan.schema, plan.rejects_schema, {"fingerprint": plan.fingerprint}
    )
    for split in plan.splits[:parts]:
        rows = split.rows
        table = pa.table(
            [
                pa.array(range(rows), plan.schema.types[0]),
                pa.array(["x"] * rows),
                pa.array([[0.0] * 32] * rows, plan.schema.field("embedding").type),
            ],
            schema=plan.schema,
        )
        writer.write(split, table, None, Manifest(split.part, rows_read=rows, rows_in=rows, rows_out=rows))
    job = {**plan.job(), **OLD}
    plan.ledger.write_job(job)
    return job


@pytest.mark.parametrize("version", [None, 1])
def test_work_left_of_older_results_is_refused_with_what_changed(plan: Plan, version: int | None) -> None:
    leave(plan, 1, version)
    with pytest.raises(SpecError) as refused:
        make_plan(plan.spec)
    (fault,) = refused.value.faults
    assert "begun by an older hfbatch (0.0.9; results version 1" in fault
    for change in CHANGES[RESULTS_VERSION]:
        assert change in fault
    assert "--overwrite" in fault
    assert make_plan(plan.spec, overwrite=True).identity["results"] == RESULTS_VERSION


def test_work_left_of_newer_results_is_refused(plan: Plan) -> None:
    leave(plan, 1, RESULTS_VERSION + 1)
    with pytest.raises(SpecError, match="created by a newer hfbatch"):
        make_plan(plan.spec)


def test_a_complete_output_of_older_results_stays_complete(plan: Plan, tmp_path: Path) -> None:
    job = leave(plan, 2, None)
    for _ in range(2):
        result = hfbatch.run(plan.spec, quiet=True)
        assert (result.exit_code, result.message[:23]) == (0, "Nothing was left to do:"), result.message
        assert verify_output(plan.spec.output.path) == []
        there = json.loads((tmp_path / "out" / "__hfbatch" / "job.json").read_text())
        assert (there["identity"], there["fingerprint"]) == (job["identity"], job["fingerprint"])
    write_shards(tmp_path / "in", sentences(3), shards=1, first_id=12)  # the next night
    with pytest.raises(SpecError, match="older hfbatch"):
        make_plan(plan.spec)


def test_a_complete_output_keeps_the_types_that_its_parts_have(plan: Plan, tmp_path: Path) -> None:
    plan.schema = plan.schema.set(0, pa.field("id", pa.int32()))  # as an older version might have found
    job = leave(plan, 2, None)
    assert hfbatch.run(plan.spec, quiet=True).exit_code == 0
    assert json.loads((tmp_path / "out" / "__hfbatch" / "job.json").read_text())["schema"] == job["schema"]
    assert verify_output(plan.spec.output.path) == []


def test_types_are_kept_for_the_sake_of_parts_alone(plan: Plan, tmp_path: Path) -> None:
    leave(plan, 0, RESULTS_VERSION)
    path = tmp_path / "out" / "__hfbatch" / "job.json"
    types = {"id": "int64", "text": "string", "gone": "string"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "types": types}))
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "x"}\n')
    source = plan.spec.input.model_copy(update={"path": str(tmp_path / "rows.jsonl")})
    again = make_plan(plan.spec.model_copy(update={"input": source}))
    assert (again.keep, again.source.types["id"]) == (["id", "text"], "string")


def test_another_job_is_reported_before_another_version(plan: Plan) -> None:
    leave(plan, 2, None)
    other = plan.spec.model_copy(update={"seed": 7})
    with pytest.raises(
        SpecError, match=r"holds the parts of another job; it differs in seed \(there: 0, now: 7\)"
    ):
        make_plan(other)


def test_an_output_without_parts_is_begun_anew(plan: Plan) -> None:
    leave(plan, 0, None)
    assert make_plan(plan.spec).identity["results"] == RESULTS_VERSION


def test_what_auto_chose_belongs_to_the_identity(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "in", sentences(12), shards=2)

    def planned(dtype: str) -> Plan:
        model = {"model": {"dtype": dtype}, "input": {"split_rows": 6}}
        return make_plan(make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", **model))

    first = planned("auto")
    first.choice = RuntimeChoice(8, "bfloat16", "cuda (NVIDIA H200)")
    leave(first, 1, RESULTS_VERSION)
    path = tmp_path / "out" / "__hfbatch" / "job.json"
    job = json.loads(path.read_text())
    assert job["settled"]["engine"] == "torch"
    del job["settled"]["engine"]  # as an older version left it
    path.write_text(json.dumps(job))
    again, named = planned("auto"), planned("bfloat16")
    assert again.choice == named.choice == first.choice
    assert again.fingerprint == named.fingerprint == first.fingerprint
    look_again(named)
    assert named.fingerprint == first.fingerprint
    with pytest.raises(SpecError, match=r"differs in model.dtype \(there: 'auto', now: 'float32'\)"):
        planned("float32")

    strict = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", **{
        "model": {"dtype": "auto"}, "input": {"split_rows": 6}, "engine": {"guard": "required"},
    })  # fmt: skip
    with pytest.raises(SpecError, match="bfloat16 without a comparison with float32"):
        make_plan(strict)
    path.write_text(json.dumps({**job, "settled": {**job["settled"], "guard": {"status": "passed"}}}))
    assert make_plan(strict).choice.dtype == "bfloat16"

    path.write_text(json.dumps({**job, "settled": {**job["settled"], "quantisation": "int8"}}))
    with pytest.raises(SpecError, match="newer hfbatch, which also chose quantisation; use that version"):
        planned("auto")

    monkeypatch.setattr(runner, "native_dtype", lambda gpus: ("cpu", "float32"))
    monkeypatch.setattr(runner, "fastest_dtype", lambda gpus: "float32")
    with pytest.raises(WorkerError, match=r"does not run it natively; .* set model.dtype=bfloat16"):
        runner.Runner(again.runner).load()
    assert runner.Runner(named.runner).load().dtype == "bfloat16"
    fresh = runner.Runner(replace(again.runner, choice=None))
    assert fresh.load().dtype == "float32"
    with pytest.raises(WorkerError, match="does not run it natively"):  # chosen by another worker of this run
        fresh.apply(first.choice)


def test_a_training_of_older_results_is_refused_unless_it_is_done(classifier: str, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    rows = pa.table({"text": sentences(12), "label": ["a", "b"] * 6})
    pq.write_table(rows, tmp_path / "rows" / "rows.parquet")
    spec = FinetuneSpec.build(
        {
            "task": "text-classification",
            "model": classifier,
            "train": str(tmp_path / "rows"),
            "output": str(tmp_path / "out"),
        }
    )
    job = make_finetune_plan(spec).job()
    del job["identity"]["results"]
    (tmp_path / "out" / "__hfbatch").mkdir(parents=True)
    (tmp_path / "out" / "__hfbatch" / "job.json").write_text(json.dumps({**job, **OLD}))
    with pytest.raises(SpecError, match=r"older hfbatch \(0\.0\.9"):
        make_finetune_plan(spec)
    (tmp_path / "out" / "_SUCCESS").touch()
    assert make_finetune_plan(spec).finished
