"""The output folder as the record of what is done."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.data.splits import Piece, Split
from hfbatch.errors import LockLostError, SplitError
from hfbatch.output.layout import REJECTS, rejects_of
from hfbatch.output.ledger import Ledger
from hfbatch.output.lock import Claim
from hfbatch.output.manifest import Manifest
from hfbatch.output.rejects import reject_schema
from hfbatch.output.sinks.parquet import ParquetSink, PartWriter
from hfbatch.output.writer import part_table_bytes

SCHEMA = pa.schema([("x", pa.int64())])


def sink_of(out) -> ParquetSink:
    return ParquetSink(Ledger(str(out)))


def split_at(start: int, size: int = 1) -> Split:
    return Split((Piece("in/a.parquet", start, start + 2, size, 0),))


def commit(
    out, split: Split, rejects: bool = False, fingerprint: str = "f", claim: Claim | None = None
) -> None:
    check = claim and claim.check
    writer = PartWriter(str(out), SCHEMA, reject_schema(SCHEMA), {"fingerprint": fingerprint}, check)
    rejected = reject_schema(SCHEMA).empty_table()
    if rejects:
        rejected = pa.Table.from_pylist([{"x": 1}], schema=reject_schema(SCHEMA))
    rows = 2 - len(rejected)
    told = Manifest(split.part, rows_read=2, rows_in=2, rows_out=rows, rows_rejected=len(rejected))
    writer.write(split, pa.table({"x": [1] * rows}, SCHEMA), rejected, told)


def test_parts_show_done_to_do_and_stale(tmp_path):
    commit(tmp_path, split_at(0))
    commit(tmp_path, split_at(2, size=99))
    state = sink_of(tmp_path).state([split_at(0), split_at(2)])
    assert state.done == [split_at(0)]
    assert state.todo == [split_at(2)]
    assert state.stale == [split_at(2, size=99).part]


def test_an_output_that_does_not_exist_is_empty(tmp_path):
    ledger = Ledger(str(tmp_path / "out"))
    assert ledger.list_parts() == set()
    assert ledger.foreign() == []
    assert ledger.read_job() is None
    assert ParquetSink(ledger).manifests([]) == []
    assert not ledger.has_success()
    ledger.clear()
    ledger.clean_temporary()


def test_removing_a_part_removes_its_rejects(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    commit(tmp_path, split_at(2), rejects=True)
    ledger = Ledger(str(tmp_path))
    ledger.remove([split_at(0).part])
    assert ledger.list_parts() == {split_at(2).part}
    assert os.listdir(tmp_path / REJECTS) == [Path(rejects_of(split_at(2).part)).name]


def test_files_of_others_are_foreign_and_survive_a_clear(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    ledger = Ledger(str(tmp_path))
    ledger.write_job({"a": 1})
    ParquetSink(ledger).save_manifests([])
    ledger.mark_success({}, SCHEMA)
    (tmp_path / "part-00000.parquet").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "_theirs").touch()
    (tmp_path / "__hfbatch/lock-00000002.json").touch()
    assert ledger.foreign() == ["notes", "part-00000.parquet"]
    ledger.clear()
    assert sorted(os.listdir(tmp_path)) == ["__hfbatch", "_theirs", "notes", "part-00000.parquet"]
    assert os.listdir(tmp_path / "__hfbatch") == ["lock-00000002.json"]


def test_job_and_success_are_kept(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.write_job({"spec": {"task": "embedding"}})
    assert ledger.read_job() == {"spec": {"task": "embedding"}}
    ledger.mark_success({"rows": 1}, SCHEMA)
    assert ledger.has_success()
    ledger.clear_success()
    assert not ledger.has_success()


def told(split: Split, **more: int) -> Manifest:
    return Manifest(split.part, rows_read=2, rows_in=2, rows_out=2, **more)


def test_footers_are_read_once_for_each_version_of_a_part(tmp_path):
    splits = [split_at(0), split_at(2)]
    for split in splits:
        commit(tmp_path, split)
    parts = [split.part for split in splits]
    from_footers = sink_of(tmp_path).manifests(parts)
    assert [m.part for m in from_footers] == parts
    wrong = replace(told(splits[1], tokens=7), rows_in=9)  # counts are the footer's, whatever a worker says
    sink_of(tmp_path).save_manifests([told(splits[0], tokens=42), wrong])
    assert [m.tokens for m in sink_of(tmp_path).manifests(parts)] == [42, 0]
    commit(tmp_path, splits[0])  # written again: another version
    assert [m.tokens for m in sink_of(tmp_path).manifests(parts)] == [0, 0]
    (tmp_path / parts[1]).unlink()
    assert "cannot be read" in (sink_of(tmp_path).manifests(parts)[1].error or "")
    for damage in (
        b"damaged",
        part_table_bytes(pa.table({"part": parts, "manifest": ["{}", "{}"]})).to_pybytes(),
    ):
        (tmp_path / "__hfbatch/manifests.PARQUET").write_bytes(damage)
        assert sink_of(tmp_path).manifests(parts[:1]) == from_footers[:1]


def test_the_audit_believes_the_listing_and_the_footers_alone(tmp_path):
    splits = [split_at(start) for start in range(0, 14, 2)]
    for split in splits:
        commit(tmp_path, split, rejects=split is splits[4])
    commit(tmp_path, split_at(0, size=99))
    sink_of(tmp_path).save_manifests([told(split) for split in splits])
    parts = [split.part for split in splits]
    (tmp_path / parts[1]).unlink()
    commit(tmp_path, splits[2], fingerprint="of another job")
    (tmp_path / parts[3]).write_bytes((tmp_path / parts[0]).read_bytes())
    (tmp_path / rejects_of(parts[4])).unlink()
    (tmp_path / parts[5]).write_bytes((tmp_path / parts[5]).read_bytes()[:-5])
    table = pq.read_table(tmp_path / parts[6])
    pq.write_table(table.slice(1), tmp_path / parts[6])
    state, manifests, wrong = sink_of(tmp_path).audit(splits, "f", [told(split) for split in splits])
    assert state.done == [splits[0], splits[5]]
    assert state.todo == [splits[1], splits[2], splits[3], splits[4], splits[6]]
    assert state.stale == [split_at(0, size=99).part]
    assert [m.part for m in manifests] == [parts[0], parts[5]]
    assert "cannot be read" in manifests[1].error
    assert parts[1] not in wrong
    assert "is of another job" in wrong[parts[2]]
    assert f"is a copy of {parts[0]}" in wrong[parts[3]]
    assert wrong[parts[4]] == f"the rejects of {parts[4]} are missing"
    assert "does not hold what its footer says: 1 rows" in wrong[parts[6]]


def test_who_lost_the_output_changes_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("hfbatch.output.lock.CONFIRM_S", 0.0)
    commit(tmp_path, split_at(0), rejects=True)
    ledger = Ledger(str(tmp_path))
    ledger.claim = Claim(str(tmp_path), "lock-00000001.json", "mine")
    (tmp_path / ".part.0.hfbatch-tmp").touch()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    part = split_at(0).part
    for change in (
        ledger.clear, ledger.clear_success, ledger.clean_temporary, ParquetSink(ledger).save_manifests,
        lambda: ledger.write_job({}), lambda: ledger.mark_success({}, SCHEMA), lambda: ledger.remove([part]),
        lambda: ledger.remove_rejects([part]), lambda: commit(tmp_path, split_at(2), claim=ledger.claim),
        lambda: commit(tmp_path, split_at(0), claim=ledger.claim),
    ):  # fmt: skip
        with pytest.raises(
            LockLostError, match="is no longer locked by this run; this run writes nothing more"
        ):
            change()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_rejects_without_a_part_are_found(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    commit(tmp_path, split_at(2), rejects=True)
    ledger = Ledger(str(tmp_path))
    assert ledger.rejects_without_part(ledger.list_parts()) == []
    (tmp_path / split_at(2).part).unlink()  # as if killed between the two
    assert ledger.rejects_without_part(ledger.list_parts()) == [split_at(2).part]
    ledger.remove_rejects(ledger.rejects_without_part(ledger.list_parts()))
    assert os.listdir(tmp_path / REJECTS) == [Path(rejects_of(split_at(0).part)).name]


def test_a_damaged_part_is_named(tmp_path):
    commit(tmp_path, split_at(0))
    ledger = Ledger(str(tmp_path))
    part = split_at(0).part
    path = tmp_path / part
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SplitError, match=f"{part} cannot be read: "):
        ParquetSink(ledger).read_footer(part)
    (manifest,) = ParquetSink(ledger).manifests([part])
    assert manifest.error.startswith(f"{part} cannot be read")
    for footer in ("{}", "[]", '{"fingerprint": "f", "split": {}, "manifest": {"part": "p", "more": 1}}'):
        path.write_bytes(part_table_bytes(pa.table({"x": [1, 2]}), {"hfbatch": footer}))
        with pytest.raises(SplitError, match=f"{part} was not written by hfbatch"):
            ParquetSink(ledger).read_footer(part)
        _, (told,), _ = sink_of(tmp_path).audit([split_at(0)], "f")
        assert told.error.startswith(f"{part} was not written by hfbatch")


def test_what_killed_writers_left_is_cleaned(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    left = [
        ".part.0.hfbatch-tmp",
        "__hfbatch/.job.json.1.hfbatch-tmp",
        "__hfbatch/rejects/.part.2.hfbatch-tmp",
    ]
    for name in left:
        (tmp_path / name).touch()
    Ledger(str(tmp_path)).clean_temporary()
    assert not any((tmp_path / name).exists() for name in left)
    assert Ledger(str(tmp_path)).list_parts() == {split_at(0).part}


def test_a_writable_folder_is_left_as_it_was(tmp_path):
    assert Ledger(str(tmp_path / "new" / "out")).check_writable() is None
    assert os.listdir(tmp_path) == []


def test_an_unwritable_output_says_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file; give a folder" in Ledger(str(tmp_path / "file")).check_writable()
    fault = Ledger(str(tmp_path / "file" / "out")).check_writable()
    assert "cannot be written: " in fault
    assert "Not a directory" in fault
    assert "give a folder that you may write" in Ledger("/proc/hfbatch-out").check_writable()
