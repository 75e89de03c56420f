"""Writing: a file is whole or absent, rows are conserved, and the footer says where they came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from hfbatch.data.reader import Rows
from hfbatch.data.serialization import as_column, deserialize, serialize
from hfbatch.data.splits import Piece, Split
from hfbatch.errors import SplitError
from hfbatch.output.layout import rejects_of
from hfbatch.output.ledger import Ledger
from hfbatch.output.manifest import Manifest
from hfbatch.output.rejects import (
    Reject,
    dump_rejects,
    first_traces,
    load_rejects,
    reject_schema,
    rejects_table,
)
from hfbatch.output.sinks.parquet import PartWriter
from hfbatch.output.writer import part_table_bytes, write_file

SPLIT = Split((Piece("a.parquet", 0, 3, 100, 7),))
SCHEMA = pa.schema([("id", pa.int64()), ("embedding", pa.list_(pa.float32(), 2))])
INPUT = pa.schema([("id", pa.int64()), ("text", pa.string())])
ROWS = Rows(
    pa.table({"id": [1, 2, 3], "text": ["x", None, "z"]}, INPUT),
    pa.table({"file": ["a.parquet"] * 3, "row": [0, 1, 2]}),
    3,
)


def output(*ids: int) -> pa.Table:
    return pa.table({"id": ids, "embedding": [[float(i), 0.5] for i in ids]}, SCHEMA)


def manifest(out: int, rejected: int) -> Manifest:
    return Manifest(SPLIT.part, rows_read=3, rows_in=out + rejected, rows_out=out, rows_rejected=rejected)


def writer_to(out) -> PartWriter:
    return PartWriter(str(out), SCHEMA, reject_schema(INPUT), {"fingerprint": "f00", "commit": "abc"})


def rejected(position: int) -> pa.Table:
    reasons = [Reject(position, "preprocess", "null", "column 'text' is null")]
    return rejects_table(ROWS, reasons, reject_schema(INPUT))


def test_a_part_carries_rows_and_its_own_history(tmp_path):
    writer_to(tmp_path / "out").write(SPLIT, output(1, 2, 3), None, manifest(3, 0))
    path = tmp_path / "out" / SPLIT.part
    table = pq.read_table(path)
    assert table.drop_columns([]).equals(output(1, 2, 3))
    footer = json.loads(pq.read_metadata(path).metadata[b"hfbatch"])
    assert footer["fingerprint"] == "f00"
    assert footer["commit"] == "abc"
    assert Split.from_dict(footer["split"]) == SPLIT
    assert Manifest(**footer["manifest"]) == manifest(3, 0)
    assert sorted(os.listdir(tmp_path / "out")) == [SPLIT.part]


def test_rejects_are_written_with_their_original_row(tmp_path):
    writer_to(tmp_path).write(SPLIT, output(1, 3), rejected(1), manifest(2, 1))
    (row,) = pq.read_table(tmp_path / rejects_of(SPLIT.part)).to_pylist()
    assert row == {
        "id": 2,
        "text": None,
        "hfbatch_file": "a.parquet",
        "hfbatch_row": 1,
        "hfbatch_stage": "preprocess",
        "hfbatch_error": "null",
        "hfbatch_message": "column 'text' is null",
    }


def test_rejects_of_an_earlier_attempt_do_not_outlive_a_commit_without_any(tmp_path):
    writer_to(tmp_path).write(SPLIT, output(1, 3), rejected(1), manifest(2, 1))
    writer_to(tmp_path).write(SPLIT, output(1, 2, 3), rejected(1).slice(0, 0), manifest(3, 0))
    assert os.listdir(tmp_path / "__hfbatch/rejects") == []


@pytest.mark.parametrize(
    ("table", "rejects", "told"),
    [
        (output(1, 2), None, manifest(3, 0)),
        (output(1, 2), rejected(1), manifest(3, 0)),
        (output(1, 2, 3), rejected(1), manifest(3, 1)),
        (output(1, 2), None, Manifest(SPLIT.part, rows_read=3, rows_in=3, rows_out=2)),
        (output(1, 2), None, Manifest(SPLIT.part, rows_read=2, rows_in=2, rows_out=2)),
    ],
)
def test_a_lost_or_doubled_row_is_never_committed(tmp_path, table, rejects, told):
    with pytest.raises(SplitError, match="rows are not conserved"):
        writer_to(tmp_path).write(SPLIT, table, rejects, told)
    assert os.listdir(tmp_path) == []


def test_columns_other_than_planned_are_never_committed(tmp_path):
    wrong = output(1, 2, 3).rename_columns(["id", "vector"])
    with pytest.raises(SplitError, match=r"columns are id: int64, vector.*planned were id: int64, embedding"):
        writer_to(tmp_path).write(SPLIT, wrong, None, manifest(3, 0))


def test_long_messages_are_cut_and_any_text_can_be_stored():
    reasons = [Reject(2, "forward", "E", "m" * 9999), Reject(0, "forward", "E", "lone \ud800 surrogate")]
    table = rejects_table(ROWS, reasons, reject_schema(INPUT))
    assert table["hfbatch_row"].to_pylist() == [0, 2]
    assert len(table["hfbatch_message"][1].as_py()) == 500


def test_text_has_dictionaries_and_floats_have_none():
    table = pa.table(
        {
            "label": ["a", "b"] * 50,
            "score": np.ones(100),
            "v": pa.array([[1.0]] * 100, pa.list_(pa.float32(), 1)),
        }
    )
    group = pq.read_metadata(pa.BufferReader(part_table_bytes(table))).row_group(0)
    columns = [group.column(at) for at in range(group.num_columns)]
    assert [column.has_dictionary_page for column in columns] == [True, False, False]
    assert {column.compression for column in columns} == {"ZSTD"}


def test_writing_replaces_a_file_whole(tmp_path):
    path = str(tmp_path / "deep" / "file")
    for data in (b"first", b"second"):
        write_file(pafs.LocalFileSystem(), path, data)
    assert (tmp_path / "deep/file").read_bytes() == b"second"
    assert os.listdir(tmp_path / "deep") == ["file"]


FULL_DISK = """
import resource, signal, sys
import pyarrow.fs as pafs
from hfbatch.output.writer import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_file(pafs.LocalFileSystem(), sys.argv[1], b"x" * 100_000)
except OSError as error:
    print("failed:", error.strerror)
"""


def test_a_write_cut_off_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "failed: File too large\n"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_output_that_cannot_be_written_names_path_and_cause(tmp_path):
    writer = writer_to(tmp_path / "file" / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        SplitError, match=r"file/out: .*part-a-.*cannot be written: .*Not a directory.*then run again"
    ):
        writer.write(SPLIT, output(1, 2, 3), None, manifest(3, 0))


def test_who_is_passed_over_between_its_check_and_its_rename_commits_nothing(tmp_path):
    """The new holder sweeps temporary files before it looks at what is there."""
    writer = writer_to(tmp_path)
    writer.check = Ledger(str(tmp_path)).clean_temporary
    with pytest.raises(SplitError, match="cannot be written"):
        writer.write(SPLIT, output(1, 2, 3), None, manifest(3, 0))
    assert os.listdir(tmp_path) == []


def test_a_packed_table_comes_back_whole():
    table = output(1, 2, 3).replace_schema_metadata({"key": "value"})
    assert deserialize(serialize(table)).equals(table, check_metadata=True)
    assert deserialize(as_column(serialize(table))[0].as_buffer()).equals(table)
    assert deserialize(serialize(table.slice(0, 0))).schema.equals(table.schema, check_metadata=True)


def test_a_packed_slice_carries_its_own_rows_only():
    table = pa.table({"x": np.arange(100_000)})
    assert len(serialize(table.slice(5, 10))) < 1000


def test_unpacking_copies_nothing():
    stream = serialize(pa.table({"x": np.arange(100_000)}))
    before = pa.total_allocated_bytes()
    table = deserialize(stream)
    assert pa.total_allocated_bytes() - before < 10_000
    values = table["x"].chunk(0).buffers()[1]
    assert stream.address <= values.address < stream.address + stream.size


def test_the_first_traceback_of_each_kind_travels_with_rejects():
    def failing(position: int, stage: str = "forward") -> Reject:
        try:
            raise ValueError("http://user:secret@host/ row " + str(position))
        except ValueError as error:
            return Reject(position, stage, "ValueError", "m", cause=error)

    null = Reject(0, "preprocess", "ValueError", "null")  # of a kind that others raise
    again = load_rejects(dump_rejects([null, *map(failing, range(1, 4)), failing(4, "preprocess")]))
    assert [bool(one.traceback) for one in again] == [False, True, False, False, True]
    assert "row 1" in again[1].traceback
    assert "secret" not in again[1].traceback
    assert {kind: trace[-6:-1] for kind, trace in first_traces(again).items()} == {
        "forward: ValueError": "row 1",
        "preprocess: ValueError": "row 4",
    }
