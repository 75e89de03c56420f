"""The output folder as the record of what is done."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest

from hfbatch.data.ledger import Ledger
from hfbatch.data.manifest import Manifest
from hfbatch.data.splits import Piece, Split
from hfbatch.data.writer import PartWriter, reject_schema
from hfbatch.errors import SplitError

SCHEMA = pa.schema([("x", pa.int64())])


def split_at(start: int, size: int = 1) -> Split:
    return Split((Piece("in/a.parquet", start, start + 2, size, 0),))


def commit(out, split: Split, rejects: bool = False) -> None:
    writer = PartWriter(str(out), SCHEMA, reject_schema(SCHEMA), {"fingerprint": "f"})
    rejected = reject_schema(SCHEMA).empty_table()
    if rejects:
        rejected = pa.Table.from_pylist([{"x": 1}], schema=reject_schema(SCHEMA))
    rows = 2 - len(rejected)
    told = Manifest(split.part, rows_read=2, rows_in=2, rows_out=rows, rows_rejected=len(rejected))
    writer.write(split, pa.table({"x": [1] * rows}, SCHEMA), rejected, told)


def test_parts_tell_done_to_do_and_stale(tmp_path):
    commit(tmp_path, split_at(0))
    commit(tmp_path, split_at(2, size=99))
    state = Ledger(str(tmp_path)).state([split_at(0), split_at(2)])
    assert state.done == [split_at(0)]
    assert state.todo == [split_at(2)]
    assert state.stale == [split_at(2, size=99).part]


def test_an_output_that_does_not_exist_is_empty(tmp_path):
    ledger = Ledger(str(tmp_path / "out"))
    assert ledger.list_parts() == set()
    assert ledger.foreign() == []
    assert ledger.read_job() is None
    assert ledger.manifests([]) == []
    assert not ledger.has_success()
    ledger.clear()
    ledger.clean_temporary()


def test_removing_a_part_removes_its_rejects(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    commit(tmp_path, split_at(2), rejects=True)
    ledger = Ledger(str(tmp_path))
    ledger.remove([split_at(0).part])
    assert ledger.list_parts() == {split_at(2).part}
    assert os.listdir(tmp_path / "_hfbatch/rejects") == [split_at(2).part]


def test_files_of_others_are_foreign_and_survive_a_clear(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    ledger = Ledger(str(tmp_path))
    ledger.write_job({"a": 1})
    ledger.save_manifests([])
    ledger.mark_success({})
    (tmp_path / "part-00000.parquet").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "_theirs").touch()
    assert ledger.foreign() == ["notes", "part-00000.parquet"]
    ledger.clear()
    assert sorted(os.listdir(tmp_path)) == ["_theirs", "notes", "part-00000.parquet"]


def test_job_and_success_are_kept(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.write_job({"spec": {"task": "embedding"}})
    assert ledger.read_job() == {"spec": {"task": "embedding"}}
    ledger.mark_success({"rows": 1})
    assert ledger.has_success()
    ledger.clear_success()
    assert not ledger.has_success()


def test_manifests_come_from_the_cache_and_else_from_footers(tmp_path):
    commit(tmp_path, split_at(0))
    commit(tmp_path, split_at(2))
    ledger = Ledger(str(tmp_path))
    parts = [split_at(0).part, split_at(2).part]
    from_footers = ledger.manifests(parts)
    assert [m.part for m in from_footers] == parts
    ledger.save_manifests([Manifest(parts[0], tokens=42)])
    assert [m.tokens for m in ledger.manifests(parts)] == [42, 0]
    (tmp_path / "_hfbatch/manifests.parquet").write_bytes(b"damaged")
    assert ledger.manifests(parts) == from_footers


def test_what_is_written_again_goes_before_the_cache(tmp_path):
    commit(tmp_path, split_at(0))
    commit(tmp_path, split_at(2))
    ledger = Ledger(str(tmp_path))
    parts = [split_at(0).part, split_at(2).part]
    ledger.save_manifests([Manifest(part, tokens=42) for part in parts])
    assert [m.tokens for m in ledger.manifests(parts, [Manifest(parts[1], tokens=7)])] == [42, 7]
    ledger.forget([parts[0]])
    assert [m.tokens for m in ledger.manifests(parts)] == [0, 42]


def test_rejects_without_a_part_are_found(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    commit(tmp_path, split_at(2), rejects=True)
    ledger = Ledger(str(tmp_path))
    assert ledger.rejects_without_part(ledger.list_parts()) == []
    (tmp_path / split_at(2).part).unlink()  # as if killed between the two
    assert ledger.rejects_without_part(ledger.list_parts()) == [split_at(2).part]
    ledger.remove_rejects(ledger.rejects_without_part(ledger.list_parts()))
    assert os.listdir(tmp_path / "_hfbatch/rejects") == [split_at(0).part]


def test_a_damaged_part_is_named(tmp_path):
    commit(tmp_path, split_at(0))
    ledger = Ledger(str(tmp_path))
    part = split_at(0).part
    path = tmp_path / part
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SplitError, match=f"{part} cannot be read: "):
        ledger.read_footer(part)
    (manifest,) = ledger.manifests([part])
    assert manifest.error.startswith(f"{part} cannot be read")


def test_what_killed_writers_left_is_cleaned(tmp_path):
    commit(tmp_path, split_at(0), rejects=True)
    left = [".part.0.hfbatch-tmp", "_hfbatch/.job.json.1.hfbatch-tmp", "_hfbatch/rejects/.part.2.hfbatch-tmp"]
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
