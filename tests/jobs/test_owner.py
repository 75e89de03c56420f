"""One job writes to an output, and its end says what the folder shows, not what the job remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import hfbatch
from hfbatch import JobSpec
from hfbatch.errors import OutputHeldError, SpecError
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import hold
from hfbatch.output.manifest import Manifest
from hfbatch.predict.identity import earlier
from hfbatch.predict.verify import verify_output
from tests.jobs import here
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, part_names, part_stamps, sentences, write_shards


@pytest.fixture
def spec(tmp_path: Path, encoder: str) -> JobSpec:
    """A job of 20 splits."""
    write_shards(tmp_path / "in", sentences(200, most=1), shards=2)
    return make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", input={"split_rows": 10})


def test_a_part_that_is_deleted_while_the_job_runs_is_reported_and_computed_again(
    tmp_path: Path, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gone, split_here = tmp_path / "out", [], here._split_here

    def deleting(*arguments: Any) -> Manifest:
        manifest = split_here(*arguments)
        if not gone:
            gone.append(manifest.part)
            (out / manifest.part).unlink()
        return manifest

    monkeypatch.setattr(here, "_split_here", deleting)
    result = job_here(spec)
    assert result.exit_code == 1
    assert (
        f"{gone[0]} is missing: it was committed, and something has deleted it since; run again"
        in result.message
    )
    assert "19 of 20 splits are committed" in result.message
    assert not (out / "_SUCCESS").exists()

    # One of another job, of the right name: the names alone would have it done.
    others = part_names(out)[5]
    table = pq.read_table(out / others)
    footer = table.schema.metadata[b"hfbatch"].replace(result.report["fingerprint"].encode(), b"0" * 32)
    pq.write_table(table.replace_schema_metadata({b"hfbatch": footer}), out / others)
    before = part_stamps(out)
    result = job_here(spec)
    assert result.exit_code == 0, result.message
    assert {name for name, stamp in part_stamps(out).items() if before.get(name) != stamp} == {
        gone[0],
        others,
    }
    assert verify_output(str(out)) == []


def test_a_job_looks_at_the_output_again_once_it_holds_it(
    tmp_path: Path, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfbatch.predict import run as job

    plan = job.make_plan(spec)
    Ledger(str(tmp_path / "out")).write_job({**plan.job(), "identity": {**plan.identity, "seed": 7}})
    (tmp_path / "out" / plan.splits[0].part).touch()
    monkeypatch.setattr(job, "make_plan", lambda *_: plan)  # made before the other job came
    with pytest.raises(SpecError, match="holds the parts of another job; it differs in seed"):
        hfbatch.run(spec, quiet=True)
    with hold(str(tmp_path / "out"), print), pytest.raises(OutputHeldError, match="is being written by"):
        hfbatch.run(spec, quiet=True)
    assert part_names(tmp_path / "out") == [plan.splits[0].part]


def test_a_new_commit_on_the_hub_is_an_error_that_names_the_revision_to_continue_with(
    tmp_path: Path, spec: JobSpec
) -> None:
    plan = hfbatch.predict.plan.make_plan(spec)
    earlier_model = {"commit": "f" * 40, "dtype": "float32"}
    job = {**plan.job(), "identity": {**plan.identity, "model": earlier_model}}
    job["model"] = {**job["model"], "commit": "f" * 40}
    plan.ledger.write_job(job)
    (tmp_path / "out" / plan.splits[0].part).touch()
    on_hub = plan.spec.model_copy(update={"model": plan.spec.model.model_copy(update={"name": "org/model"})})
    with pytest.raises(SpecError, match=f"set model.revision={'f' * 40} to continue"):
        earlier(plan.ledger, plan.identity, on_hub, plan.state)
    with pytest.raises(SpecError, match=r"differs in model\.commit") as local:
        earlier(plan.ledger, plan.identity, plan.spec, plan.state)
    assert "model.revision" not in str(local.value)


def test_a_plan_takes_no_lock_and_changes_nothing(tmp_path: Path, spec: JobSpec) -> None:
    with hold(str(tmp_path / "out"), print):
        before = sorted(tmp_path.rglob("*"))
        hfbatch.predict.plan.make_plan(spec)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_job_never_takes_the_output_of_a_training(tmp_path: Path, spec: JobSpec) -> None:
    Ledger(str(tmp_path / "out")).write_job({"spec": {"train": {}}})
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="holds a fine-tuning; choose another folder"):
            hfbatch.predict.plan.make_plan(spec, overwrite)
