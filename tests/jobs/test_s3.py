"""From and to an S3 server: the same promises, kill and resume included."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import boto3
import pyarrow.dataset as ds
import pytest

from hfbatch import SpecError
from hfbatch.plan import make_plan
from hfbatch.verify import verify_output
from tests.jobs.tools import make_spec, run_job, sentences, start_job, write_shards


def test_a_killed_job_on_s3_goes_on_where_it_stopped(tmp_path: Path, minilm: str, s3: dict[str, str]) -> None:
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    write_shards(tmp_path / "in", sentences(600, most=12), shards=5)
    for file in (tmp_path / "in").iterdir():
        client.upload_file(str(file), s3["bucket"], f"in/{file.name}")
    out = f"s3://{s3['bucket']}/out"
    spec = make_spec(
        "embedding", minilm, f"s3://{s3['bucket']}/in", out, input={"split_rows": 30}, batch={"size": 16}
    )

    def parts() -> dict[str, object]:
        listed = client.list_objects_v2(Bucket=s3["bucket"], Prefix="out/part-").get("Contents", [])
        return {found["Key"]: found["LastModified"] for found in listed}

    job = start_job(spec, tmp_path, "local")
    deadline = time.monotonic() + 300
    while len(parts()) < 3:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    kept = parts()
    assert 3 <= len(kept) < 20

    code, printed = run_job(spec, tmp_path, "local")

    assert code == 0, printed
    assert kept.items() <= parts().items()
    assert verify_output(out) == []
    table = ds.dataset(out, format="parquet").to_table()
    assert sorted(table["id"].to_pylist()) == list(range(600))
    keys = {found["Key"] for found in client.list_objects_v2(Bucket=s3["bucket"], Prefix="out/")["Contents"]}
    assert {"out/_SUCCESS", "out/_hfbatch/job.json", "out/_hfbatch/report.html"} <= keys


def test_faults_tell_no_secret_of_a_url(tmp_path: Path, encoder: str, s3: dict[str, str]) -> None:
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    client.put_object(Bucket=s3["bucket"], Key="out/notes.txt", Body=b"mine")
    write_shards(tmp_path / "in", sentences(5, most=1))
    spec = make_spec("embedding", encoder, tmp_path / "in", f"s3://me:verysecret@{s3['bucket']}/out")
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    assert "notes.txt" in str(caught.value)
    assert "verysecret" not in str(caught.value)
