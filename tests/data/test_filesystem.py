"""Paths, URLs and object stores."""

from __future__ import annotations

import os

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.data.filesystem import absolute, join, open_filesystem, redact
from hfbatch.data.ledger import Ledger
from hfbatch.data.manifest import Manifest
from hfbatch.data.reader import read_split
from hfbatch.data.writer import PartWriter, reject_schema, write_file
from hfbatch.errors import SplitError
from tests.data.inputs import plan_of, read_all, source_of, write_groups


def test_local_paths_become_absolute_and_urls_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("data/*.parquet") == f"{tmp_path}/data/*.parquet"
    assert absolute("file:///a/b%20c") == "/a/b c"
    assert absolute("~/x") == os.path.expanduser("~/x")
    assert absolute("s3://bucket/key") == "s3://bucket/key"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?secret_key=abc&region=eu", "s3://bucket/x?secret_key=***&region=eu"),
        ("https://host/x?token=abc", "https://host/x?token=***"),
        ("abfs://container@account.dfs/x", "abfs://container@account.dfs/x"),
        ("sftp://me:secret@host/x", "sftp://host/x"),
        ("/data/a@b?token=1", "/data/a@b?token=1"),
    ],
)
def test_secrets_are_not_shown(path, shown):
    assert redact(path) == shown


def test_names_are_joined_before_a_query():
    assert join("s3://bucket/x/?region=eu", "a") == "s3://bucket/x/a?region=eu"
    assert join("/data", "a") == "/data/a"


@pytest.fixture
def lake(s3, tmp_path) -> str:
    """An input on S3: two files of two row groups in two partitions."""
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    for day in (1, 2):
        write_groups(tmp_path / "a.parquet", [[day * 10, day * 10 + 1], [day * 10 + 2]])
        client.upload_file(str(tmp_path / "a.parquet"), s3["bucket"], f"lake/day={day}/a.parquet")
    return f"s3://{s3['bucket']}/lake"


def test_an_input_on_s3_is_read_like_a_local_one(lake):
    source = source_of(lake)
    rows = read_all(source, source.cut(2), "id > 10")
    assert rows.table["id"].to_pylist() == [11, 12, 20, 21, 22]
    assert rows.table["day"].to_pylist() == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("below", ["/day=*/a.parquet", "/day=1/a.parquet", "/**"])
def test_globs_and_single_files_on_s3(lake, below):
    source = source_of(lake + below)
    rows = read_all(source, source.cut(100))
    assert rows.table["id"].to_pylist() == [10, 11, 12, 20, 21, 22][: 3 if "=1" in below else 6]


def test_a_vanished_object_is_named(lake):
    source = source_of(lake)
    split = source.cut(100)[0]
    source.fs.delete_file(f"{source.root}/{split.pieces[0].file}")
    with pytest.raises(SplitError, match=r"day=1/a\.parquet is gone from s3://"):
        read_split(split, plan_of(source))


def test_parts_are_committed_and_found_on_s3(lake, s3):
    source = source_of(lake)
    splits = source.cut(2)
    out = f"s3://{s3['bucket']}/out"
    ledger = Ledger(out)
    assert ledger.check_writable() is None
    assert ledger.list_parts() == set()
    plan = plan_of(source)
    writer = PartWriter(out, plan.schema, reject_schema(plan.schema), {"fingerprint": "f"})
    for split in splits[:-1]:
        rows = read_split(split, plan)
        count = rows.table.num_rows
        told = Manifest(split.part, rows_read=count, rows_in=count, rows_out=count)
        writer.write(split, rows.table, None, told)
    state = ledger.state(splits)
    assert (state.done, state.todo, state.stale) == (splits[:-1], splits[-1:], [])
    assert [m.rows_out for m in ledger.manifests([split.part for split in state.done])] == [
        split.rows for split in state.done
    ]
    read = pq.read_table(f"{ledger.root}/{splits[0].part}", filesystem=ledger.fs)
    assert read["id"].to_pylist() == [10, 11]
    ledger.write_job({"a": 1})
    ledger.mark_success({})
    ledger.remove([splits[0].part])
    assert ledger.list_parts() == {split.part for split in splits[1:-1]}
    ledger.clear()
    assert ledger.list_parts() == set()
    assert ledger.read_job() is None
    assert not ledger.has_success()


def test_a_bucket_that_does_not_exist_is_a_fault_before_work(s3):
    assert "cannot be written" in Ledger("s3://no-such-bucket/out").check_writable()


def test_a_file_of_many_mib_arrives_whole_on_s3(s3):
    fs, root = open_filesystem(f"s3://{s3['bucket']}/big")
    data = pa.py_buffer(os.urandom(24 << 20))
    write_file(fs, root, data)
    assert fs.get_file_info(root).size == data.size


def test_fsspec_outputs_work_too():
    fs, root = open_filesystem("memory://out/sub")
    write_file(fs, f"{root}/a", b"x")
    assert fs.open_input_stream(f"{root}/a").read() == b"x"
    assert Ledger("memory://out").foreign() == ["sub"]
