"""Bad data becomes a reject or a named failure, and nothing else is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import hfbatch
from hfbatch import SpecError
from hfbatch.data.formats import sampling
from hfbatch.output.layout import ERRORS
from hfbatch.pages.report import build_report, render_html
from hfbatch.predict.describe import sample_lengths
from hfbatch.predict.plan import make_plan
from hfbatch.predict.verify import verify_output
from hfbatch.spec.job import RejectsSpec
from tests.jobs.here import job_here
from tests.jobs.poison import poison_model
from tests.jobs.tools import (
    make_spec,
    read_output,
    read_rejects,
    sentences,
    write_shards,
)

cluster = pytest.mark.usefixtures("ray_cluster")


def faults_of(*args: object, **sections: object) -> str:
    with pytest.raises(SpecError) as caught:
        make_plan(make_spec(*args, **sections))
    return "\n".join(caught.value.faults)


def test_null_empty_a_megabyte_and_lines_that_cannot_be_read(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str | None] = [*sentences(20), None, "", "a long story " * 80_000]
    lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)]
    lines += [
        "null",
        '{"id": 23, "text": "\\ud800"}',
        '{"id": 24, "text": 5}',
        '{"id": 25, "text": "b", "late": 1}',
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sampling, "FIRST_BYTES", 100)
    monkeypatch.setattr(sampling, "BLOCKS", 0)
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", rejects={"max_fraction": 0.5})
    result = job_here(spec)
    assert result.exit_code == 0
    assert read_output(tmp_path / "out")["id"].to_pylist() == [*range(20), 21, 22, 25]
    (path,) = (tmp_path / "out/__hfbatch/rejects").iterdir()
    rejects = pq.read_table(path).to_pylist()
    assert [(reject["hfbatch_row"], reject["hfbatch_stage"], reject["id"]) for reject in rejects] == [
        (20, "preprocess", 20), (23, "read", None), (24, "read", None), (25, "read", None),
    ]  # fmt: skip
    assert [reject["hfbatch_line"] for reject in rejects] == [None, *lines[23:26]]
    assert "input.types: {text: string}" in rejects[3]["hfbatch_message"]
    counts = result.report["rows"]
    assert (counts["read"], counts["in"], counts["out"], counts["rejected"]) == (27, 27, 23, 4)
    assert counts["truncated"] >= 1
    assert (
        "which the plan read: late (1 row); to keep them, give their types in input.types" in result.message
    )
    assert verify_output(str(tmp_path / "out")) == []

    # The types of the first run hold, and others make another job.
    (tmp_path / "in/0.jsonl").write_text('{"id": "x", "text": "a"}\n')
    assert make_plan(spec).read.schema == pa.schema({"id": pa.int64(), "text": pa.string()})
    given = {"types": {"id": "string"}}
    told = faults_of("embedding", encoder, tmp_path / "in", tmp_path / "out", input=given)
    assert "it differs in input.types (there: None, now: {'id': 'string'})" in told


def test_too_many_rejects_writes_everything_but_success(tmp_path: Path, encoder: str) -> None:
    texts: list[str | None] = [*sentences(8, most=1), None, None]
    write_shards(tmp_path / "in", texts)
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out")
    for _ in range(2):  # a rerun has nothing to do and says the same
        result = job_here(spec)
        assert result.exit_code == 3
        assert "2 of 10 rows were rejected" in result.message
        assert not (tmp_path / "out/_SUCCESS").exists()
    assert "to accept them, add --set rejects.max_fraction=0.2" in result.message
    assert len(read_output(tmp_path / "out")) == 8
    accepting = spec.model_copy(update={"rejects": RejectsSpec(max_fraction=0.2)})
    assert job_here(accepting).exit_code == 0
    assert (tmp_path / "out/_SUCCESS").exists()
    assert job_here(spec).exit_code == 3
    assert not (tmp_path / "out/_SUCCESS").exists()


def test_wrong_type_and_missing_columns_are_faults_before_work(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", ["a"])
    inputs = tmp_path / "in"
    assert "column 'id' is int64; task embedding takes string as 'text'" in faults_of(
        "embedding", encoder, inputs, tmp_path / "out", input={"columns": {"text": "id"}}
    )
    missing = faults_of("embedding", encoder, inputs, tmp_path / "out", input={"columns": {"text": "body"}})
    assert "column 'body' not in input (has: id, text)" in missing
    assert "output.keep: column 'nope'" in faults_of(
        "embedding", encoder, inputs, tmp_path / "out", output={"keep": ["nope"]}
    )
    assert not (tmp_path / "out").exists()


def test_every_fault_is_reported_at_once(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", ["a"])
    faults = faults_of(
        "embedding", encoder, tmp_path / "in", tmp_path / "out",
        input={"columns": {"text": "body"}, "filter": "lang ="}, output={"keep": ["nope"]}, params={"poling": "cls"},
    )  # fmt: skip
    for part in ("unknown key 'params.poling'", "column 'body'", "column 'nope'", "filter"):
        assert part in faults


def test_a_clash_of_columns_names_the_prefix(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"], "embedding": [1]}), tmp_path / "in/a.parquet")
    assert "set output.prefix" in faults_of("embedding", encoder, tmp_path / "in", tmp_path / "out")


def test_an_empty_folder_and_an_absent_one(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "in").mkdir()
    assert str(tmp_path / "in") in faults_of("embedding", encoder, tmp_path / "in", tmp_path / "out")
    assert "nowhere" in faults_of("embedding", encoder, tmp_path / "nowhere", tmp_path / "out")


def test_an_output_is_never_read_as_input_and_the_plan_and_the_report_say_so(
    tmp_path: Path, encoder: str
) -> None:
    data = write_shards(tmp_path / "data", sentences(10))
    for source in (f"{data}/*", f"{data}/**/*.parquet", data):
        with pytest.raises(
            SpecError, match=r"/out lies in the input's folder, where the next run would read it"
        ):
            make_plan(make_spec("embedding", encoder, source, data / "out"))
    shutil.copytree(data, data / "__hfbatch" / "rejects")
    with pytest.raises(SpecError, match="data/__hfbatch/rejects lies in the output"):
        make_plan(make_spec("embedding", encoder, data / "__hfbatch" / "rejects", data))
    (data / "elsewhere").symlink_to(tmp_path / "far")
    first = make_plan(make_spec("embedding", encoder, data, tmp_path / "far" / "out"))
    assert first.source.left_out == ["elsewhere (links that lead nowhere)"]
    first.ledger.write_job(first.job())
    shutil.copy(data / "shard-00000-000.parquet", tmp_path / "far" / "out" / first.splits[0].part)
    plan = make_plan(first.spec)
    assert plan.rows == 10
    line = "elsewhere/out (outputs of hfbatch, which are read only where they are input.path themselves)"
    assert f"left out of input: {line}" in plan.notes
    report = build_report(plan.job(), [], set(), {}, None)
    assert report["left_out"] == [line]
    assert "elsewhere/out (outputs of hfbatch" in render_html(report)


def test_zero_row_files_and_differing_schemas(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(6, most=1), shards=1)
    pq.write_table(
        pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string())}),
        tmp_path / "in/zero.parquet",
    )
    extra = pa.table({"text": ["more"], "id": pa.array([6], pa.int32()), "lang": ["en"]})
    pq.write_table(extra, tmp_path / "in/extra.parquet")
    result = job_here(make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out"))
    assert result.exit_code == 0, result.message
    out = read_output(tmp_path / "out")
    assert out["id"].to_pylist() == list(range(7))
    assert out["lang"].to_pylist() == [None] * 6 + ["en"]
    pq.write_table(pa.table({"text": [b"\x00"], "id": ["six"]}), tmp_path / "in/wrong.parquet")
    faults = faults_of("embedding", encoder, tmp_path / "in", tmp_path / "other")
    assert "wrong.parquet" in faults
    assert "string" in faults


def test_only_zero_rows_still_has_the_schema(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", [], shards=1)
    result = job_here(make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out"))
    assert result.exit_code == 0, result.message
    assert read_output(tmp_path / "out").column_names == ["id", "text", "embedding"]


def test_a_truncated_file_is_named_in_the_plan_and_fails_alone(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(30, most=1))
    victim = tmp_path / "in/shard-00000-001.parquet"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-40])
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out")
    plan = make_plan(spec)
    assert [split.pieces[0].file for split in plan.broken] == [victim.name]
    result = job_here(spec)
    assert result.exit_code == 1
    assert victim.name in result.message
    assert len(read_output(tmp_path / "out")) == 20
    assert not (tmp_path / "out/_SUCCESS").exists()

    victim.write_bytes(whole)
    assert job_here(spec).exit_code == 0
    assert len(read_output(tmp_path / "out")) == 30


def test_files_may_disagree_on_columns_that_nobody_reads(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "in").mkdir()
    for name, score in (("a", pa.array([1])), ("b", pa.array([0.5]))):
        rows = {"id": [1], "text": ["x"], "score": score}
        pq.write_table(pa.table(rows), tmp_path / f"in/{name}.parquet")
    spec = ("embedding", encoder, tmp_path / "in", tmp_path / "out")
    conflict = "column 'score' is int64 in a.parquet but double in b.parquet"
    plan = make_plan(make_spec(*spec, output={"keep": ["id"]}))
    assert plan.schema.names == ["id", "embedding"]
    assert f"{conflict}, and no type holds the values of both exactly" in faults_of(*spec)
    assert "or name the columns to keep in output.keep" in faults_of(*spec)
    assert conflict in faults_of(*spec, input={"filter": "score > 0"}, output={"keep": ["id"]})
    assert conflict in faults_of(*spec, input={"columns": {"text": "score"}}, output={"keep": ["id"]})


def test_a_json_column_is_text_to_a_task_and_json_in_the_output(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "in").mkdir()
    texts = pa.array(['{"a": "some text"}', None, '["more"]'])
    rows = pa.table(
        {
            "text": pa.ExtensionArray.from_storage(pa.json_(), texts),
            "key": pa.array([b"0" * 16] * 3, pa.uuid()),
        }
    )
    pq.write_table(rows, tmp_path / "in/a.parquet")
    spec = ("embedding", encoder, tmp_path / "in", tmp_path / "out")
    plan = make_plan(make_spec(*spec))
    assert plan.schema.types[:2] == [pa.json_(), pa.uuid()]
    lengths = sample_lengths(plan)
    assert lengths is not None
    assert lengths["rows"] == 2
    assert "column 'key' is extension<arrow.uuid>; task embedding takes string" in faults_of(
        *spec, input={"columns": {"text": "key"}}
    )


def test_a_file_that_vanishes_mid_job_fails_alone(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(240, most=4), shards=12)
    spec = make_spec("embedding", encoder, tmp_path / "in", tmp_path / "out", input={"split_rows": 20})
    last, aside = tmp_path / "in/shard-00000-011.parquet", tmp_path / "aside"
    result = job_here(spec, meanwhile=lambda: last.rename(aside))
    assert result.exit_code == 1
    assert last.name in result.message
    assert len(read_output(tmp_path / "out")) == 220
    errors = tmp_path / "out" / ERRORS
    assert f"the first traceback of each kind is in {errors}; the same command" in result.message
    (found,) = errors.iterdir()
    assert found.name == "split-preprocess-SplitError.txt"
    assert found.read_text().startswith("split: preprocess: SplitError, first in part-shard-00000-011-")
    assert "Traceback (most recent call last)" in found.read_text()
    aside.rename(last)
    assert job_here(spec).exit_code == 0
    assert not any(errors.iterdir())
    assert len(read_output(tmp_path / "out")) == 240


def test_a_row_that_the_model_raises_on_is_rejected_alone(tmp_path: Path) -> None:
    model = poison_model(tmp_path / "model", raises="dawn")
    texts = [f"river number {k}" for k in range(40)]
    texts[11] += " before dawn"
    texts[12] += " dawn"
    write_shards(tmp_path / "in", texts)
    assert "trust_remote_code" in faults_of("embedding", model, tmp_path / "in", tmp_path / "out")
    spec = make_spec(
        "embedding", model, tmp_path / "in", tmp_path / "out",
        model={"trust_remote_code": True}, rejects={"max_fraction": 0.1},
    )  # fmt: skip
    result = job_here(spec)
    assert result.exit_code == 0, result.message
    rejects = read_rejects(tmp_path / "out")
    assert [(row["id"], row["hfbatch_stage"], row["hfbatch_message"]) for row in rejects] == [
        (11, "forward", "the model does not take this word"),
        (12, "forward", "the model does not take this word"),
    ]
    assert read_output(tmp_path / "out")["id"].to_pylist() == [k for k in range(40) if k not in (11, 12)]
    errors = tmp_path / "out" / ERRORS
    assert result.message.endswith(f"The first traceback of each kind is in {errors}.")
    (found,) = errors.iterdir()
    assert found.read_text().count("Traceback (most recent call last)") == 1
    assert found.read_text().endswith("the model does not take this word\n")
    job_here(spec)
    assert found.exists()  # its rows are still rejected


@pytest.mark.timeout(300)
@cluster
def test_a_row_that_kills_its_process_fails_its_split_alone(tmp_path: Path) -> None:
    model = poison_model(tmp_path / "model", kills="dawn")
    texts = [f"river number {k}" for k in range(40)]
    texts[11] += " before dawn"
    write_shards(tmp_path / "in", texts, shards=4)
    spec = make_spec(
        "embedding", model, tmp_path / "in", tmp_path / "out",
        model={"trust_remote_code": True}, input={"split_rows": 10},
    )  # fmt: skip
    result = hfbatch.run(spec, quiet=True)
    assert result.exit_code == 1
    assert "its process died 3 times in the forward stage" in result.message
    assert next(failed["part"] for failed in result.report["failed"]).startswith("part-shard-00000-001")
    assert read_output(tmp_path / "out")["id"].to_pylist() == [k for k in range(40) if not 10 <= k < 20]


JOB_HERE = """
import sys
from hfbatch import JobSpec
from tests.jobs.here import job_here
result = job_here(JobSpec.load(sys.argv[1]))
print(result.message)
sys.exit(result.exit_code)
"""


def test_a_full_disk_is_reported_and_nothing_half_written_stays(tmp_path: Path, encoder: str) -> None:
    """A tmpfs of 400 KiB, in a mount namespace of its own, holds about half of the parts."""
    write_shards(tmp_path / "in", [f"{text} {k}" for k, text in enumerate(sentences(4000, most=1))], shards=8)
    out = tmp_path / "out"
    out.mkdir()
    spec = make_spec(
        "embedding", encoder, tmp_path / "in", out, batch={"size": 64}, input={"split_rows": 500}
    )
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    (tmp_path / "job.py").write_text(JOB_HERE)
    script = (
        f"mount -t tmpfs -o size=400k tmpfs {out} && "
        f"{sys.executable} {tmp_path}/job.py {tmp_path}/spec.yaml; code=$?; "
        f"ls {out}; cp -r {out} {tmp_path}/kept; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    kept = tmp_path / "kept"
    parts = [pq.read_table(part) for part in kept.glob("part-*.parquet")]
    assert 0 < len(parts) < 8
    assert all(len(part) == 500 for part in parts)

    shutil.copytree(kept, out, dirs_exist_ok=True)  # as if room had been made
    assert job_here(spec).exit_code == 0
    assert len(read_output(out)) == 4000
    assert verify_output(str(out)) == []


def test_an_unwritable_output(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", ["a"])
    (tmp_path / "file").write_text("I am a file")
    assert str(tmp_path / "file") in faults_of("embedding", encoder, tmp_path / "in", tmp_path / "file")
    assert "cannot be written" in faults_of("embedding", encoder, tmp_path / "in", "/proc/no/folder")


def test_the_parts_of_another_job_are_safe(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(5, most=1))
    out = tmp_path / "out"
    assert job_here(make_spec("embedding", encoder, tmp_path / "in", out)).exit_code == 0
    other = make_spec("embedding", encoder, tmp_path / "in", out, params={"pooling": "cls"}, seed=3)
    faults = faults_of("embedding", encoder, tmp_path / "in", out, params={"pooling": "cls"}, seed=3)
    assert "params.pooling" in faults
    assert "seed" in faults
    assert "--overwrite" in faults
    assert job_here(other, overwrite=True).exit_code == 0
    assert verify_output(str(out)) == []
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in faults_of("embedding", encoder, tmp_path / "in", out)


def test_a_model_without_safe_weights(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", ["a"])
    bare = Path(shutil.copytree(encoder, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert "has no weights" in faults_of("embedding", str(bare), tmp_path / "in", tmp_path / "out")
    torch.save({}, bare / "pytorch_model.bin")
    assert "pickle" in faults_of("embedding", str(bare), tmp_path / "in", tmp_path / "out")
    (bare / "config.json").unlink()
    assert "config.json" in faults_of("embedding", str(bare), tmp_path / "in", tmp_path / "out")


@cluster
def test_a_broken_weight_file_ends_the_job_at_once(tmp_path: Path, encoder: str) -> None:
    write_shards(tmp_path / "in", sentences(30, most=1))
    bad = Path(shutil.copytree(encoder, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    result = hfbatch.run(make_spec("embedding", str(bad), tmp_path / "in", tmp_path / "out"), quiet=True)
    assert result.exit_code == 1
    assert "the model does not load on a worker" in result.message
