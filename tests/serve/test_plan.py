"""The plan of an endpoint reports every fault before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hfbatch.errors import SpecError
from hfbatch.serve.check import sample_rows
from hfbatch.serve.plan import make_plan
from hfbatch.spec.job import ServeSpec
from tests.jobs.tools import call, write_shards


def faults(values: dict) -> str:
    with pytest.raises(SpecError) as caught:
        make_plan(ServeSpec.build(values))
    return "\n".join(caught.value.faults)


def test_all_faults_are_reported_together(encoder: str) -> None:
    found = faults(
        {
            "task": "embedding",
            "model": encoder,
            "engine": {"name": "auto", "guard": "required"},
            "params": {"pooling": "sideways"},
            "output": {"path": "out/", "truncated": True},
            "serve": {"host": "::", "proxy": "haproxy"},
        }
    )
    for words in (
        "set serve.token_env",
        "engine auto",
        "engine.guard required",
        "sideways",
        "output.truncated",
        "serve.proxy haproxy does not reach replicas at serve.host ::",
    ):
        assert words in found


@pytest.mark.parametrize("token", [None, "", "short"])
def test_a_token_that_can_be_guessed_is_refused(
    encoder: str, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENDPOINT_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("ENDPOINT_TOKEN", token)
    serve = {"host": "0.0.0.0", "token_env": "ENDPOINT_TOKEN"}
    found = faults({"task": "embedding", "model": encoder, "serve": serve})
    assert "ENDPOINT_TOKEN" in found
    assert "openssl rand" in found


@pytest.mark.parametrize(
    ("host", "loopback"), [("localhost", True), ("::1", True), ("127.0.0.9", True), ("::", False)]
)
def test_addresses_of_this_machine_need_no_token(encoder: str, host: str, loopback: bool) -> None:
    spec = ServeSpec.build({"task": "embedding", "model": encoder, "serve": {"host": host}})
    assert spec.serve.loopback == loopback


def test_a_dry_run_names_the_endpoint(encoder: str, tmp_path: Path) -> None:
    done = call("serve", "embedding", "--model", encoder, "--port", "9000", "--dry-run", "--json")
    (shown,) = json.loads(done.stdout)
    assert shown["url"] == "http://127.0.0.1:9000"
    assert shown["name"] == Path(encoder).name
    spec = {"task": "embedding", "model": encoder}
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**spec, "serve": {"name": name}}), "utf8")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    both = json.loads(call("serve", *files, "--dry-run", "--json").stdout)
    assert [plan["name"] for plan in both] == ["a", "b"]
    alike = call("serve", *files, "--set", "serve.name=a", "--dry-run")
    assert (alike.exit_code, "different names" in alike.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["embedding"], "one TASK with --model MODEL"),
        (["embedding", "in/", "--model", "m"], "one TASK with --model MODEL"),
        (["embedding", "--model", "m", "--param", "pooling"], "--param pooling=VALUE"),
        (["embedding", "--model", "m", "--set", "serve.autoscale={min: 3, max: 2}"], "below min 3"),
    ],
)
def test_command_lines_that_name_no_endpoint_are_refused(words: list[str], fix: str) -> None:
    done = call("serve", *words)
    assert done.exit_code == 2
    assert fix in " ".join(done.stderr.split())


def test_a_check_sends_the_rows_of_the_input(encoder: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", ["one", "two", "three"], shards=1)
    values = {"task": "embedding", "model": encoder, "input": str(source)}
    assert sample_rows(make_plan(ServeSpec.build(values)))[:2] == [{"text": "one"}, {"text": "two"}]
    example = sample_rows(make_plan(ServeSpec.build({"task": "embedding", "model": encoder})))
    assert all(set(row) == {"text"} for row in example)


def test_a_check_sends_the_columns_of_a_template(encoder: str, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", ["one", "two", "three"], shards=1)
    values = {"task": "embedding", "model": encoder, "params": {"template": "{{ id }}: {{ text }}"}}
    plan = make_plan(ServeSpec.build({**values, "input": str(source)}))
    assert sample_rows(plan)[:2] == [{"id": 0, "text": "one"}, {"id": 1, "text": "two"}]
    with pytest.raises(SpecError, match="add the `input` of a job"):
        sample_rows(make_plan(ServeSpec.build(values)))
