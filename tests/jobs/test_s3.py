"""From and to an S3 server: the same promises, kill and resume included."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import boto3
import pyarrow.dataset as ds
import pytest
from typer.testing import CliRunner

import hfbatch
from hfbatch import JobSpec, SpecError
from hfbatch.cli.app import app
from hfbatch.data.reader import read_split
from hfbatch.output.ledger import Ledger
from hfbatch.predict.plan import make_plan
from hfbatch.predict.verify import verify_output
from hfbatch.runtime.config import RunnerConfig
from tests.jobs.here import job_here
from tests.jobs.poison import slow_model
from tests.jobs.tools import make_spec, read_output, sentences, start_job, write_shards


@pytest.mark.timeout(300)
def test_a_killed_job_on_s3_goes_on_where_it_stopped(
    tmp_path: Path, s3: dict[str, str], ray_cluster: str
) -> None:
    """Under keys that would be others in a URL, and with a secret in the URL, which goes to the workers and nowhere else."""
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    write_shards(tmp_path / "in", sentences(600, most=6), shards=5)
    for file in (tmp_path / "in").iterdir():
        client.upload_file(str(file), s3["bucket"], f"in #1?50%+é/{file.name}")
    bucket = f"s3://me:verysecret@{s3['bucket']}"
    out = f"{bucket}/out#2"
    slow, fast = slow_model(tmp_path / "models")
    options: dict[str, Any] = {"input": {"split_rows": 30}, "batch": {"size": 16}}
    code = {"model": {"trust_remote_code": True}}
    spec = make_spec("embedding", slow, f"{bucket}/in #1?50%+é", out, **options, **code)

    def parts() -> dict[str, object]:
        listed = client.list_objects_v2(Bucket=s3["bucket"], Prefix="out#2/part-").get("Contents", [])
        return {found["Key"]: found["LastModified"] for found in listed}

    job = start_job(spec, tmp_path, ray_cluster)
    deadline = time.monotonic() + 300
    while len(parts()) < 3:
        assert job.poll() is None, job.output
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    job.wait()
    kept = parts()
    assert 3 <= len(kept) < 20

    result = hfbatch.run(spec, quiet=True)

    assert result.exit_code == 0, result.message
    assert kept.items() <= parts().items()
    assert verify_output(out) == []
    ledger = Ledger(out)
    table = ds.dataset(ledger.root, format="parquet", filesystem=ledger.fs).to_table()
    local = make_spec("embedding", fast, tmp_path / "in", tmp_path / "out", **options, **code)
    assert job_here(local).exit_code == 0
    assert table.sort_by("id").combine_chunks().equals(read_output(tmp_path / "out"))
    listed = client.list_objects_v2(Bucket=s3["bucket"])["Contents"]
    keys = {found["Key"] for found in listed if not found["Key"].startswith("in ")}
    assert {"out#2/_SUCCESS", "out#2/__hfbatch/job.json", "out#2/__hfbatch/report.html"} <= keys
    assert all(key.startswith("out#2/") for key in keys)
    stored = [client.get_object(Bucket=s3["bucket"], Key=key)["Body"].read() for key in keys]
    assert not [
        text for text in (*stored, job.output.encode(), repr(result).encode()) if b"verysecret" in text
    ]


def test_no_secret_of_a_url_is_shown_or_stored(tmp_path: Path, encoder: str, s3: dict[str, str]) -> None:
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    write_shards(tmp_path / "in", sentences(5, most=1), shards=1)
    client.upload_file(str(tmp_path / "in" / "shard-00000-000.parquet"), s3["bucket"], "in/a.parquet")
    bucket, saved = f"s3://me:verysecret@{s3['bucket']}", tmp_path / "saved.yaml"
    saved.write_text("task: another")
    saved.chmod(0o644)

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
        assert "verysecret" not in done.output + repr(done.exception)
        return done.output

    flags = ["-m", encoder, "--column", "text=text", "--save", str(saved), "--dry-run"]
    assert f"s3://{s3['bucket']}/out" in told("embed", f"{bucket}/in", f"{bucket}/out", *flags)
    assert "(mode 0600)" in told("embed", f"{bucket}/in", f"{bucket}/out", *flags, "--json")
    assert saved.stat().st_mode & 0o777 == 0o600
    spec = JobSpec.load(saved)
    assert spec.output.path.unmasked == f"{bucket}/out"
    plan = make_plan(spec)
    assert RunnerConfig.from_json(plan.runner.to_json()).root.unmasked == f"{bucket}/in"
    assert read_split(plan.splits[0], pickle.loads(pickle.dumps(plan.read))).read == 5
    assert "verysecret" not in json.dumps(plan.job()) + repr(plan)
    plan.ledger.write_job(plan.job())
    for command in (["status"], ["status", "--json"], ["report"], ["verify"], ["verify", "--json"]):
        assert told(*command, f"{bucket}/out")
    for wrong in (
        f"{bucket}/none",
        "http://me:verysecret@127.0.0.1:9/a?sig=verysecret",
        "s3://me:very/verysecret@b/x",
    ):
        told("embed", wrong, f"{bucket}/out", "-m", encoder, "--dry-run")
        told("embed", f"{bucket}/in", wrong, "-m", encoder, "--dry-run", "--json")
        told(
            "finetune",
            "text-classification",
            wrong,
            f"{bucket}/out",
            "-m",
            wrong,
            "--eval",
            wrong,
            "--dry-run",
        )
        for command in ("status", "report", "verify"):
            told(command, wrong)


def test_faults_tell_no_secret_of_a_url(tmp_path: Path, encoder: str, s3: dict[str, str]) -> None:
    client = boto3.client("s3", endpoint_url=s3["endpoint"])
    client.put_object(Bucket=s3["bucket"], Key="out/notes.txt", Body=b"mine")
    write_shards(tmp_path / "in", sentences(5, most=1))
    spec = make_spec("embedding", encoder, tmp_path / "in", f"s3://me:verysecret@{s3['bucket']}/out")
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    assert "notes.txt" in str(caught.value)
    assert "verysecret" not in str(caught.value)
