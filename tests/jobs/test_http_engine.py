"""Engine http: the rows of a job are answered by an endpoint, exactly once in the output, and every fault is named."""

from __future__ import annotations

import asyncio
import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.responses import JSONResponse, Response

from hfbatch.errors import SpecError, WorkerError
from hfbatch.predict.plan import make_plan
from hfbatch.runtime.runner import Runner
from tests.jobs.endpoint import Endpoint, error, faults_with, spec_of
from tests.jobs.here import job_here
from tests.jobs.tools import call, read_output, read_rejects

SCHEMA = {
    "type": "object",
    "properties": {
        "stars": {"type": "integer", "minimum": 1},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["stars", "tags"],
}


def test_each_row_has_its_answer_and_what_it_took_is_reported(endpoint: Endpoint, tmp_path: Path) -> None:
    texts = [f"text {k}" for k in range(30)]
    spec = spec_of(
        endpoint,
        tmp_path,
        texts,
        params={"details": True},
        engine={"prices": {"input": 1000, "output": 2000}},
    )
    done = job_here(spec)
    out = read_output(tmp_path / "out")
    assert out["generated_text"].to_pylist() == [text.upper() for text in texts]
    assert out["finish_reason"].unique().to_pylist() == ["stop"]
    assert out["prompt_tokens"].to_pylist() == out["new_tokens"].to_pylist() == [len(text) for text in texts]
    tokens = sum(map(len, texts))
    usage = {"requests": 30, "prompt_tokens": tokens, "new_tokens": tokens, "cost": tokens * 3000 / 1e6}
    assert done.report["usage"] == pytest.approx(usage)
    assert done.report["cached_tokens"] == 30
    assert set(endpoint.seen.values()) == {1}
    assert 2 <= endpoint.most_under_way <= 8  # batch.size
    first = endpoint.bodies[0]
    assert {key: value for key, value in first.items() if key != "prompt"} == {
        "model": "some-model",
        "temperature": 0.0,
    }


def test_what_is_committed_is_not_asked_for_again(endpoint: Endpoint, tmp_path: Path) -> None:
    spec = spec_of(endpoint, tmp_path, [f"text {k}" for k in range(30)])
    job_here(spec)
    first = read_output(tmp_path / "out")
    gone = sorted((tmp_path / "out").glob("part-*.parquet"))[1]
    rows = pq.read_metadata(gone).num_rows
    gone.unlink()
    slower = spec.engine.model_copy(update={"requests_per_minute": 6e4, "timeout": 30.0})  # of no result
    job_here(spec.model_copy(update={"engine": slower}))
    assert read_output(tmp_path / "out").equals(first)
    assert sum(endpoint.seen.values()) == 30 + rows


def test_chats_are_sent_as_messages_and_come_back_with_the_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"say {k}"}] for k in range(5)
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(5), "messages": chats}), tmp_path / "in/chats.parquet")
    params = {
        "return_full_text": None,
        "temperature": 0.5,
        "do_sample": None,
        "stop": ["."],
        "body": {"top_k": 3},
    }
    job_here(spec_of(endpoint, tmp_path, [], params=params))
    wanted = [[*chat, {"role": "assistant", "content": chat[1]["content"].upper()}] for chat in chats]
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == wanted
    assert [body["messages"] in chats for body in endpoint.bodies] == [True] * 5
    assert len({body["seed"] for body in endpoint.bodies}) == 5
    assert all(
        (body["temperature"], body["stop"], body["top_k"]) == (0.5, ["."], 3) for body in endpoint.bodies
    )


def test_messages_are_rendered_from_columns(endpoint: Endpoint, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Summarise: {{ text }}"}]
    job_here(spec_of(endpoint, tmp_path, ["one", None, "two"], params={"messages": messages}))
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == ["SUMMARISE: ONE", "SUMMARISE: TWO"]
    assert [reject["id"] for reject in read_rejects(tmp_path / "out")] == [1]


def test_identical_greedy_rows_are_asked_once_and_sampled_ones_each(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    job_here(spec_of(endpoint, tmp_path / "greedy", ["same"] * 9))
    assert endpoint.seen["same"] == 3  # one for each split
    job_here(spec_of(endpoint, tmp_path / "sampled", ["other"] * 9, params={"do_sample": None}))
    assert endpoint.seen["other"] == 9


def test_rows_that_the_endpoint_refuses_are_rejects_with_its_message(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    def answer(text: str, body: dict[str, Any], times: int) -> Any:
        replies = {
            "busy": text if times > 2 else Response("full", 429, {"Retry-After": "0"}),
            "long": error(400, "too many tokens"),
            "broken": error(500, "cannot"),
            "odd": JSONResponse({"choices": []}),
            "tool": JSONResponse({"choices": [{"text": None, "finish_reason": "tool_calls"}]}),
            "filtered": JSONResponse({"choices": [{"text": "x", "finish_reason": "content_filter"}]}),
            "half": Response(r'{"choices": [{"text": "\ud83d"}]}', media_type="application/json"),
        }
        return replies.get(text, text)

    endpoint.answer = answer
    texts = ["fine", "busy", "long", "broken", "odd", "tool", "filtered", "", "half", "good"]
    job_here(spec_of(endpoint, tmp_path, texts))
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == ["fine", "busy", "good"]
    messages = {reject["id"]: reject for reject in read_rejects(tmp_path / "out")}
    assert "400: too many tokens" in str(messages[2])
    assert "500: cannot" in str(messages[3])
    assert "no choices" in str(messages[4])
    assert "tool_calls" in str(messages[5])
    assert "content_filter" in str(messages[6])
    assert "empty" in str(messages[7])
    assert "surrogates" in str(messages[8])
    assert (endpoint.seen["busy"], endpoint.seen["broken"], endpoint.seen["long"]) == (3, 8, 1)


def test_a_row_that_is_never_answered_in_full_is_a_reject_if_others_are(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    page = Response("<html>", media_type="text/html")
    endpoint.answer = lambda text, body, times: page if text == "bad" else text
    done = job_here(spec_of(endpoint, tmp_path, ["a", "bad", "b"], input={"split_rows": 3}))
    assert done.exit_code == 0, done.report["failed"]
    assert read_output(tmp_path / "out")["generated_text"].to_pylist() == ["a", "b"]
    assert "which is not JSON" in str(read_rejects(tmp_path / "out"))
    endpoint.answer = lambda text, body, times: page
    done = job_here(spec_of(endpoint, tmp_path / "all", ["a", "b"], input={"split_rows": 3}))
    assert (done.exit_code, "which is not JSON" in done.report["failed"][0]["error"]) == (1, True)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "engine.token_env"),
        (404, "check engine.url and model.name"),
        (429, "engine.requests_per_minute"),
    ],
)
def test_an_endpoint_that_answers_no_row_ends_the_job_and_commits_nothing(
    endpoint: Endpoint, tmp_path: Path, status: int, words: str
) -> None:
    endpoint.answer = lambda text, body, times: error(status, "no")
    done = job_here(spec_of(endpoint, tmp_path, [f"text {k}" for k in range(6)]))
    assert done.exit_code == 1
    assert words in done.report["failed"][0]["error"]
    assert not list((tmp_path / "out").glob("part-*"))
    endpoint.answer = lambda text, body, times: "yes"
    assert job_here(spec_of(endpoint, tmp_path, [])).exit_code == 0


def test_typed_answers_are_checked_against_the_schema(endpoint: Endpoint, tmp_path: Path) -> None:
    answers = [
        '{"stars": 3, "tags": ["a"]}',
        '{"stars": "3", "tags": []}',
        '{"stars": 3}',
        '{"stars": 3, "tags": [], "more": 1}',
        '{"stars": 0, "tags": ["b"]}',
        '{"stars": 4, "tags": [',
        '{"tags": ["b", "a"], "stars": 5}',
    ]
    endpoint.answer = lambda text, body, times: answers[int(text)]
    texts = [str(k) for k in range(len(answers))]
    job_here(spec_of(endpoint, tmp_path, texts, params={"constraint": {"json_schema": SCHEMA}}))
    out = read_output(tmp_path / "out")
    assert out["id"].to_pylist() == [0, 6]
    assert out["parsed"].to_pylist() == [{"stars": 3, "tags": ["a"]}, {"stars": 5, "tags": ["b", "a"]}]
    assert out.schema.field("parsed").type == pa.struct(
        [("stars", pa.int64()), ("tags", pa.list_(pa.string()))]
    )
    assert all(
        "does not satisfy params.constraint" in str(reject) for reject in read_rejects(tmp_path / "out")
    )
    sent = endpoint.bodies[0]["response_format"]["json_schema"]
    assert (sent["schema"]["additionalProperties"], sent["strict"]) == (False, True)


@pytest.mark.parametrize("name", ["URL/s.json", "file:///etc/hostname", "s.json", "#/$defs/b", "#b"])
def test_what_a_schema_refers_to_is_in_it_and_never_fetched(
    endpoint: Endpoint, tmp_path: Path, name: str
) -> None:
    name = name.replace("URL", endpoint.url)
    schema = {"type": "object", "properties": {"stars": {"anyOf": [{"$ref": name}]}}}
    faults = faults_with(endpoint, tmp_path, params={"constraint": {"json_schema": schema}})
    assert f"params.constraint.json_schema refers to {name!r}" in faults
    assert endpoint.others == []


def test_answers_are_checked_by_what_a_schema_holds(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda text, body, times: text
    texts = ['{"a": {"n": 1}}', '{"a": {"n": "x"}}', '{"a": {"n": NaN}}']
    schema = {
        "$id": f"{endpoint.url}/s",
        "properties": {"a": {"$ref": "#/$defs/b"}},
        "$defs": {"b": {"properties": {"n": {"type": "number"}}}},
    }
    job_here(spec_of(endpoint, tmp_path, texts, params={"constraint": {"json_schema": schema}}))
    assert read_output(tmp_path / "out")["id"].to_pylist() == [0]
    assert [one["hfbatch_error"] for one in read_rejects(tmp_path / "out")] == ["UnusableText"] * 2
    assert endpoint.others == []


def test_embeddings_share_requests_and_bad_texts_fail_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda text, body, times: error(400, "bad") if text == "bad" else text
    texts = ["a", "bb", "bad", "dddd", "", "ffffff"]
    spec = spec_of(
        endpoint, tmp_path, texts, "embedding", engine={"texts_per_request": 3}, input={"split_rows": 6}
    )
    done = job_here(spec)
    out = read_output(tmp_path / "out")
    assert out["embedding"].to_pylist() == [[len(text), 0.5, -1] for text in ("a", "bb", "dddd", "ffffff")]
    assert [reject["id"] for reject in read_rejects(tmp_path / "out")] == [2, 4]
    assert max(len(body["input"]) for body in endpoint.bodies) == 2  # of the rows of a shard
    assert done.report["usage"]["prompt_tokens"] == 1 + 2 + 4 + 6
    assert done.report["histogram"]["name"] == "norm"


@pytest.mark.parametrize("vector", [[], None, ["a"], [1.0, math.nan], [[1.0]], [1e39], [1.0, 2.0]])
def test_vectors_that_are_none_are_rejects(endpoint: Endpoint, tmp_path: Path, vector: Any) -> None:
    body = json.dumps({"data": [{"index": 0, "embedding": vector}]})
    endpoint.answer = lambda text, _, times: Response(body, media_type="application/json")
    spec = spec_of(endpoint, tmp_path, ["a"], "embedding", params={"dimensions": 3})
    runner = Runner(make_plan(spec).runner)
    done = runner.run({"text": pa.array(["a"])})
    assert [reject.error for reject in done.rejects] == ["EndpointError"]


@pytest.mark.parametrize("vector", [["1.5"], [True], [10**400], [None]])
def test_what_is_no_number_is_not_made_one(endpoint: Endpoint, tmp_path: Path, vector: list[Any]) -> None:
    endpoint.answer = lambda text, _, times: JSONResponse({"data": [{"embedding": vector}]})
    job_here(spec_of(endpoint, tmp_path, ["a"], "embedding"))
    assert [reject["hfbatch_error"] for reject in read_rejects(tmp_path / "out")] == ["EndpointError"]


@pytest.mark.parametrize("indexes", [[], [False], [0, 0], ["0"], [None]])
def test_a_vector_is_of_the_text_that_its_index_states(
    endpoint: Endpoint, tmp_path: Path, indexes: list[Any]
) -> None:
    unstated: list[dict[str, Any]] = [{"embedding": [9.0]}]
    items = [{"index": index, "embedding": [9.0]} for index in indexes] or unstated
    endpoint.answer = lambda text, _, times: JSONResponse({"data": items})
    runner = Runner(make_plan(spec_of(endpoint, tmp_path, ["a"], "embedding")).runner)
    done = runner.run({"text": pa.array(["a", "b"])})
    assert [reject.error for reject in done.rejects] == ["EndpointError"] * 2
    alone = runner.run({"text": pa.array(["c"])})
    assert len(alone.rejects) == (indexes != [])


@pytest.mark.parametrize("number", [-5, 2**62, 10**30, True, 1.5, "3", None])
def test_counts_that_cannot_be_are_none(endpoint: Endpoint, tmp_path: Path, number: Any) -> None:
    body = {
        "choices": [{"text": "x"}],
        "usage": {"prompt_tokens": number, "completion_tokens": number},
    }
    endpoint.answer = lambda text, _, times: JSONResponse(body)
    done = job_here(spec_of(endpoint, tmp_path, ["a", "b"], params={"details": True}))
    assert done.report["usage"] == {"requests": 2, "prompt_tokens": 0, "new_tokens": 0, "cost": None}
    assert read_output(tmp_path / "out")["new_tokens"].to_pylist() == [None, None]


def test_requests_that_fail_together_are_one_error(
    endpoint: Endpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint.answer = lambda text, body, times: Response("no", 401)
    runner = Runner(make_plan(spec_of(endpoint, tmp_path, ["a"])).runner)
    with pytest.raises(WorkerError, match="answers 401"):
        runner.run({"text": pa.array([str(k) for k in range(40)])})
    gc.collect()
    assert "never retrieved" not in capfd.readouterr().err


def test_the_token_is_sent_and_kept_out_of_the_output(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret-token\n")

    def answer(text: str, body: dict[str, Any], times: int) -> Any:
        repeated = endpoint.headers[-1]["authorization"]
        odd = {"content": None, "refusal": repeated}
        answers = {
            "b": error(400, f"wrong key {repeated}"),
            "c": JSONResponse({"choices": [{"message": odd}]}),
        }
        return answers.get(text, text)

    endpoint.answer = answer
    job_here(spec_of(endpoint, tmp_path, ["a", "b", "c"], engine={"token_env": "SOME_TOKEN"}))
    assert len(read_rejects(tmp_path / "out")) == 2
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer very-secret-token"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes()
    monkeypatch.setenv("SOME_TOKEN", "very-secret\r\ntoken")
    assert "SOME_TOKEN holds a line break" in faults_with(
        endpoint, tmp_path, engine={"token_env": "SOME_TOKEN"}
    )
    monkeypatch.delenv("SOME_TOKEN")
    with pytest.raises(SpecError, match="SOME_TOKEN is not set"):
        make_plan(spec_of(endpoint, tmp_path, [], engine={"token_env": "SOME_TOKEN"}))


def test_the_rate_of_requests_is_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    moments: list[float] = []

    def answer(text: str, body: dict[str, Any], times: int) -> str:
        moments.append(asyncio.get_running_loop().time())
        return text

    endpoint.answer = answer
    texts = [f"text {k}" for k in range(12)]
    job_here(
        spec_of(endpoint, tmp_path, texts, engine={"requests_per_minute": 1200}, input={"split_rows": 12})
    )
    assert len(moments) == 12
    assert moments[-1] - moments[0] >= 9 * 0.05 * 0.9  # three splits, each of four requests, at 20 a second


def test_an_endpoint_that_stops_in_the_middle_ends_the_job(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.engines.sending.MOST_TRIES", 2)
    runner = Runner(make_plan(spec_of(endpoint, tmp_path, ["a"])).runner)
    runner.load()
    endpoint.stop()
    endpoint.answer = lambda text, body, times: Response("gone", 200)
    with pytest.raises(WorkerError, match="does not answer request"):
        runner.run({"text": pa.array(["a", "b"])})


def test_a_preview_asks_for_its_rows_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    spec = spec_of(endpoint, tmp_path, [f"text {k}" for k in range(9)])
    path = tmp_path / "job.yaml"
    path.write_text(spec.to_yaml(), encoding="utf8")
    done = call("preview", str(path), "--rows", "2", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["output"]["generated_text"] for row in rows] == ["TEXT 0", "TEXT 1"]
    assert sum(endpoint.seen.values()) == 2
    np.testing.assert_array_equal([*endpoint.seen], ["text 0", "text 1"])
