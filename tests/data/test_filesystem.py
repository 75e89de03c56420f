"""Paths, URLs and object stores."""

from __future__ import annotations

import copy
import json
import os
import pickle

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.data.filesystem import absolute, join, open_filesystem, redact
from hfbatch.data.reader import read_split
from hfbatch.errors import SpecError, SplitError, WorkerError, redact_text
from hfbatch.output.ledger import Ledger
from hfbatch.output.manifest import Manifest
from hfbatch.output.rejects import reject_schema
from hfbatch.output.sinks.parquet import ParquetSink, PartWriter
from hfbatch.output.writer import write_file
from hfbatch.spec.job import JobSpec
from hfbatch.spec.location import WITH_SECRETS, Location
from tests.data.inputs import plan_of, read_all, source_of, write_groups


def test_local_paths_become_absolute_and_urls_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert absolute("data/*.parquet") == f"{tmp_path}/data/*.parquet"
    assert absolute("file:///a/b%20c") == "/a/b c"
    assert absolute("~/x") == os.path.expanduser("~/x")
    assert absolute("s3://bucket/key") == "s3://bucket/key"
    for name in ("run#2", "50%", "a b", "é?"):
        assert absolute((tmp_path / name).as_uri()) == str(tmp_path / name)
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "link").symlink_to("else/where")
    assert absolute("link/../x") == f"{tmp_path}/else/x"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://bucket/x?secret_key=abc&region=eu", "s3://bucket/x?secret_key=***&region=eu"),
        ("https://host/x?token=abc", "https://host/x?token=***"),
        ("abfs://container@account.dfs/x", "abfs://container@account.dfs/x"),
        ("sftp://me:secret@host/x", "sftp://host/x"),
        ("/data/a@b?token=1", "/data/a@b?token=1"),
        (
            "https://host:8080/x/a@b?sig=abc&X-Amz-Credential=me&y=1",
            "https://host:8080/x/a@b?sig=***&X-Amz-Credential=***&y=1",
        ),
        ("s3://key:se/cr@et@bucket/x", "s3://bucket/x"),
        ("simplecache::s3://key:secret@bucket/x", "simplecache::s3://bucket/x"),
        ("zip://a.csv::http://me:secret@host/a.zip", "zip://a.csv::http://host/a.zip"),
    ],
)
def test_secrets_are_not_shown(path, shown):
    assert redact(path) == shown


def test_a_long_text_without_spaces_is_searched_for_secrets_in_no_time():
    text = "z" * 200_000  # took minutes while each letter could begin the scheme of a URL
    assert redact_text(f"{text} https://me:secret@a {text}") == f"{text} https://a {text}"


def test_a_location_shows_its_secret_only_where_it_is_asked_for():
    full = "s3://key:secret@bucket/x?region=eu"
    shown, location = "s3://bucket/x?region=eu", Location(full)
    for text in (
        str(location),
        f"{location}",
        repr(location),
        json.dumps([location]),
        "".join([location]),
    ):
        assert shown in text
        assert "secret" not in text
    spec = JobSpec.build({"task": "embedding", "model": full, "input": full, "output": {"path": full}})
    for text in (repr(spec), spec.to_yaml(), spec.model_dump_json(), str(spec.model_dump())):
        assert "secret" not in text
    for same in (
        spec,
        copy.deepcopy(spec),
        pickle.loads(pickle.dumps(spec)),
        JobSpec.build(spec.model_dump()),
    ):
        assert same.input.path.unmasked == same.output.path.unmasked == same.model.name.unmasked == full
    assert JobSpec.build(spec.model_dump(mode="json", context=WITH_SECRETS)).input.path.unmasked == full
    assert join(location, "a").unmasked == "s3://key:secret@bucket/x/a?region=eu"
    for error in (SpecError([f"{full} is gone", full]), SplitError(f"no {full}"), WorkerError(full)):
        assert "secret" not in f"{error} {error!r} {error.args}"


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


AWKWARD = [
    "run#2",
    "run?2",
    "run%23",
    "50%",
    "a b",
    "a+b",
    "é",
    "a::b",
    "[x]",
    "?k=v&l=w",
    "c@d",
    "x?region=eu",
]
"""Keys that would be something else in a URL, in a chain of filesystems or in a glob."""


def test_a_key_means_itself_as_input_and_as_output(s3, tmp_path):
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    for number, key in enumerate([*AWKWARD, "run", "scores", "scores#1"]):
        write_groups(tmp_path / "a.parquet", [[number]])
        client.upload_file(str(tmp_path / "a.parquet"), s3["bucket"], f"{key}/a.parquet")
    for number, key in enumerate(AWKWARD):
        folder = f"s3://{s3['bucket']}/{key}"
        for path in (f"{folder}/", f"{folder}/a.parquet", f"{folder}/*.parquet"):
            source = source_of(path)
            assert read_all(source, source.cut(10)).table["id"].to_pylist() == [number], path
        ledger = Ledger(f"{folder}/out")
        assert ledger.check_writable() is None
        ledger.write_job({"number": number})
        stored = client.get_object(Bucket=s3["bucket"], Key=f"{key}/out/__hfbatch/job.json")
        assert json.loads(stored["Body"].read()) == {"number": number}
    assert Ledger(f"s3://{s3['bucket']}/scores#1").root == f"{s3['bucket']}/scores#1"


@pytest.mark.parametrize("key", AWKWARD[:-1])
def test_a_key_means_itself_without_an_endpoint(monkeypatch, key):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    options = "?region=eu-west-1&endpoint_override=https://127.0.0.1:9"
    fs, root = open_filesystem(f"s3://me:a%2Fb@bucket/{key}/{options}")
    assert root == f"bucket/{key}"
    (kept,) = (value for value in fs.__reduce__()[1] if isinstance(value, dict))
    assert (kept["region"], kept["access_key"], kept["secret_key"]) == ("eu-west-1", "me", "a/b")
    assert join(f"s3://bucket/{key}/{options}", "x") == f"s3://bucket/{key}/x{options}"
    assert open_filesystem(f"gs://anonymous@bucket/{key}")[1] == f"bucket/{key}"
    assert open_filesystem(f"memory://lake/{key}")[1].lstrip("/") == f"lake/{key}"
    assert open_filesystem(f"/lake/{key}")[1] == f"/lake/{key}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/x?secret_key=abc", "holds a secret where none is read; set AWS_ACCESS_KEY_ID"),
        ("s3://me:a/b@bucket/x", "with %2F for each slash in the secret"),
        ("http://host/run#2/a.parquet", "# ends the address of a file on the web; write %23"),
        ("ftp://host/dir/a?b", r"\? would not be part of the name there; rename it"),
    ],
)
def test_a_path_that_would_be_taken_for_another_is_refused(path, message):
    with pytest.raises(SpecError, match=message) as caught:
        open_filesystem(path)
    assert "abc" not in str(caught.value)
    assert "a/b" not in str(caught.value)


def test_options_of_a_bucket_hold_beside_an_endpoint(s3, monkeypatch):
    fs, root = open_filesystem("s3://me:a%2Fb@bucket/x?region=eu-west-1&allow_bucket_creation=true")
    (kept,) = (value for value in fs.__reduce__()[1] if isinstance(value, dict))
    chosen = {"region": "eu-west-1", "allow_bucket_creation": True, "access_key": "me", "secret_key": "a/b"}
    assert root == "bucket/x"
    assert {name: kept[name] for name in chosen} == chosen
    assert s3["endpoint"].endswith(kept["endpoint_override"])


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
        reported = Manifest(split.part, rows_read=count, rows_in=count, rows_out=count)
        writer.write(split, rows.table, None, reported)
    state = ParquetSink(ledger).state(splits)
    assert (state.done, state.todo, state.stale) == (splits[:-1], splits[-1:], [])
    assert [m.rows_out for m in ParquetSink(ledger).manifests([split.part for split in state.done])] == [
        split.rows for split in state.done
    ]
    read = pq.read_table(f"{ledger.root}/{splits[0].part}", filesystem=ledger.fs)
    assert read["id"].to_pylist() == [10, 11]
    ledger.write_job({"a": 1})
    ledger.mark_success({}, plan.schema)
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
