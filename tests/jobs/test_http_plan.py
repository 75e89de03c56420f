"""Engine http: what the plan refuses, and what it asks of the endpoint."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

import pytest
from starlette.responses import RedirectResponse, Response

from hfbatch import JobSpec
from hfbatch.cli.catalogue import describe_task
from hfbatch.errors import SpecError
from hfbatch.predict.plan import make_plan
from hfbatch.spec.engines import HttpEngineSpec
from hfbatch.tasks import ENDPOINT_TASKS
from tests.jobs.endpoint import Endpoint, faults_with, spec_of
from tests.jobs.tools import make_spec


def test_the_plan_names_what_an_endpoint_cannot_do(endpoint: Endpoint, tmp_path: Path) -> None:
    for sections, words in (
        ({"task": "fill-mask"}, "endpoints answer embedding, text-generation, not fill-mask"),
        ({"task": "auto"}, "name the task"),
        ({"model": {"dtype": "float32"}}, "model.dtype: the endpoint loads the model"),
        ({"model": {"revision": "main", "dtype": "auto"}}, "model.revision: the endpoint loads the model"),
        ({"tokenizer": {"add_tokens": ["x"]}}, "tokenizer: the endpoint has the tokenizer"),
        ({"batch": {"max_length": 8}}, "batch.max_length"),
        ({"params": {"constraint": {"choices": ["a", "b"]}}}, "takes a json_schema"),
        ({"params": {"body": {"model": "other"}}}, "params.body cannot set model"),
        ({"params": {"body": {"until": datetime.date(2026, 1, 31)}}}, "params.body is not JSON"),
        ({"params": {"body": {"bias": math.nan}}}, "params.body is not JSON"),
        ({"params": {"temperature": 0.5}}, "leave one of them out"),
        ({"params": {"num_beams": 4}}, "num_beams"),
        ({"engine": {"guard": "required"}}, "engine.guard required"),
        ({"workers": {"gpus": 1}}, "workers.gpus"),
    ):
        assert words in faults_with(endpoint, tmp_path, **sections), sections


def test_the_plan_asks_the_endpoint_for_its_models(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.models = {"data": [{"id": "some-modal"}, {"id": "z"}]}
    assert "does not list 'some-model'; it lists 'some-modal', 'z'" in faults_with(endpoint, tmp_path)
    endpoint.models = Response("no", 401)
    assert "answers 401; name the variable" in faults_with(endpoint, tmp_path)
    endpoint.models = RedirectResponse("https://elsewhere.example/v1/models")
    assert "redirects requests to https://elsewhere.example" in faults_with(endpoint, tmp_path)
    for unlisted in (
        Response("what?", 404),
        Response("[" * 100_000),
        Response("{}", media_type="text/a; charset=hex"),
    ):
        endpoint.models = unlisted
        notes = make_plan(spec_of(endpoint, tmp_path, [])).notes
        assert any("does not list its models" in note for note in notes)
    endpoint.url = "http://127.0.0.1:1"
    assert "no endpoint answers at http://127.0.0.1:1" in faults_with(endpoint, tmp_path)


@pytest.mark.parametrize("task", ENDPOINT_TASKS)
def test_the_example_of_a_task_names_the_engine(task: str) -> None:
    assert JobSpec.build(describe_task(task)["example"]).engine.name == "http"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/v1", "http://me:secret@a/v1", "http://a/v1?key=secret", "http:///v1"]
)
def test_urls_that_are_none_are_refused_without_their_secrets(url: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as found:
        make_spec("text-generation", "m", tmp_path, tmp_path / "out", engine={"name": "http", "url": url})
    assert "engine" in str(found.value)
    assert "secret@" not in str(found.value)
    assert HttpEngineSpec(name="http", url="https://a.example/base/v1/").url == "https://a.example/base"
