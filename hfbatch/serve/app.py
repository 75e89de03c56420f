"""The HTTP interface of an endpoint, as a FastAPI application. Does not import Ray or torch."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import pydantic_core
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from hfbatch._version import __version__
from hfbatch.errors import HfbatchError
from hfbatch.serve import openai
from hfbatch.serve.endpoint import Endpoint
from hfbatch.serve.gate import BodyTooLargeError, Gate, Measured, error_body
from hfbatch.serve.metrics import Metrics
from hfbatch.serve.rows import Answer, RequestError, Row
from hfbatch.serve.schema import predict_schema
from hfbatch.serve.stream import TextStream, cut_at

B = TypeVar("B", bound=openai.Body)
EMBEDDING, GENERATION = "embedding", "text-generation"
OnToken = Callable[[int], None]


class Ask(Protocol):
    """Has rows answered together with those of other requests."""

    def __call__(self, rows: Sequence[Row], on_token: OnToken | None = None) -> Awaitable[list[Answer]]:
        """Returns the answer of each row. :param on_token: called in the event loop with each token of a single row."""


def build_app(endpoint: Endpoint, ask: Ask, metrics: Metrics) -> Gate:
    """Returns the application.

    :param endpoint: reads and checks rows.
    :param ask: answers them.
    :param metrics: counts requests and rows.
    """
    api = Api(endpoint, ask, metrics)
    task, where = endpoint.task, endpoint.config.endpoint
    app = FastAPI(title=where.name, version=__version__, description=task.summary)
    app.get("/health", summary="Whether the replica answers")(api.health)
    app.get("/ready", summary="Whether the model is loaded")(api.health)
    app.get("/metrics", summary="Counters for Prometheus")(api.show_metrics)
    app.get("/v1/models", summary="The model, as OpenAI lists it")(api.models)
    app.get("/v1/models/{name:path}", summary="The model, as OpenAI describes it")(api.model)
    app.post("/predict", summary=task.summary, openapi_extra=predict_schema(endpoint.rows))(api.predict)
    plain = endpoint.rows.rendered is None  # the OpenAI API has no place for the columns of a template
    if plain and task.name == EMBEDDING and openai.answers_with(task.output_fields()[0].type):
        app.post("/v1/embeddings", openapi_extra=_takes(openai.EmbeddingRequest))(api.embeddings)
    if plain and task.name == GENERATION:
        app.post("/v1/chat/completions", openapi_extra=_takes(openai.ChatRequest))(api.chat)
        app.post("/v1/completions", openapi_extra=_takes(openai.CompletionRequest))(api.complete)
    for kind in (RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    return Gate(Measured(app, metrics), where, endpoint.config.token)


class Api:
    """The handlers of requests. See `build_app` for the parameters."""

    def __init__(self, endpoint: Endpoint, ask: Ask, metrics: Metrics) -> None:
        self._endpoint, self._ask, self._metrics = endpoint, ask, metrics
        self._name, self._limits = endpoint.config.endpoint.name, endpoint.config.endpoint.limits
        self._started = int(time.time())

    async def health(self) -> dict[str, Any]:
        """A replica is reached once its model is loaded."""
        return {
            "status": "ok",
            "model": self._name,
            "task": self._endpoint.task.name,
            "replica": self._endpoint.label,
        }

    async def show_metrics(self) -> Response:
        """The numbers of all replicas."""
        return Response(await self._metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """One model."""
        return {"object": "list", "data": [self._described()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model. :raises RequestError: for another name."""
        self._check_model(name)
        return self._described()

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._started, "owned_by": "hfbatch"}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name, self._endpoint.task.model.name):
            raise RequestError(f"model {name!r} is not served here; use {self._name!r}", 404)

    async def predict(self, request: Request) -> Response:
        """Answers rows. A row that is rejected is null, and its reason stands in `rejects`."""
        body = await _json(request)
        if not isinstance(body, dict) or not isinstance(body.get("rows"), list) or len(body) > 1:
            raise RequestError('send {"rows": [...]} and nothing else', 422)
        answers = await self._answer(body["rows"], "{}", uuid.uuid4().hex)
        rejects = [{"row": k, **reason} for k, answer in enumerate(answers) if (reason := answer.reason())]
        return _answered({"rows": [answer.to_values() for answer in answers], "rejects": rejects})

    async def embeddings(self, request: Request) -> Response:
        """Embeds texts."""
        body = await self._body(request, openai.EmbeddingRequest)
        answers = await self._answer(body.rows(), "{}", "")
        openai.refuse_rejects(answers)
        return _answered(openai.embeddings(answers, "embedding", body, self._name))

    async def chat(self, request: Request) -> Response:
        """Answers a chat, at once or as a stream."""
        return await self._generate(await self._body(request, openai.ChatRequest), chat=True)

    async def complete(self, request: Request) -> Response:
        """Continues prompts, at once or as a stream."""
        return await self._generate(await self._body(request, openai.CompletionRequest), chat=False)

    async def _body(self, request: Request, kind: type[B]) -> B:
        try:
            body = kind.model_validate(await _json(request))
        except ValidationError as error:
            found = error.errors(include_url=False)
            raise RequestError(
                [f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in found[:5]]
            ) from error
        body.refuse_unknown()
        self._check_model(body.model)
        return body

    async def _generate(self, body: Any, chat: bool) -> Response:
        params, own = body.params(), self._endpoint.task.params
        faults = [
            f"{shown}={value} is above serve.limits.{name}={most}; ask for less"
            for shown, value, name, most in (
                ("max_tokens", body.most or 0, "new_tokens", self._limits.new_tokens),
                ("n", body.n or 1, "texts", self._limits.texts),
            )
            if value > most
        ]
        texts_of_row = body.n or own.num_return_sequences
        if body.stream and (len(body.rows()) > 1 or texts_of_row > 1 or not self._endpoint.streams):
            faults.append(
                "stream needs one prompt, n=1, params.num_beams=1 and engine torch; leave stream out"
            )
        if faults:
            raise RequestError(faults)
        ready = await asyncio.to_thread(self._endpoint.with_params, params)
        source = uuid.uuid4().hex if body.seed is None else f"seed {body.seed}"
        texts = openai.Texts(chat, self._name)
        stops = params.get("stop") or own.stop or ()
        if body.stream:
            row = self._read(body.rows(), ready, source)[0]
            events = self._events(
                row, texts, stops, bool(body.stream_options and body.stream_options.include_usage)
            )
            return StreamingResponse(events, media_type="text/event-stream")
        answers = await self._answer(body.rows(), ready, source)
        openai.refuse_rejects(answers)
        return _answered(texts.whole(answers, lambda text: cut_at(text, stops)))

    async def _events(
        self, row: Row, texts: openai.Texts, stops: Sequence[str], usage: bool
    ) -> AsyncIterator[bytes]:
        """The events of a stream: texts as they are generated, the finish reason, and numbers of tokens if asked for."""
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        asked = asyncio.ensure_future(self._ask([row], tokens.put_nowait))
        asked.add_done_callback(lambda _: tokens.put_nowait(None))
        stream = TextStream(self._endpoint.task, stops)
        try:
            yield _event(texts.piece("", first=True))
            while (token := await tokens.get()) is not None:
                if text := stream.add(token):
                    yield _event(texts.piece(text))
            answers = await asked
            openai.refuse_rejects(answers)
            self._metrics.rows(answers)
            text, reason = openai.choices(answers[0])[0]
            cut = cut_at(text, stops)
            yield _event(texts.piece(stream.rest(cut), reason if cut == text else "stop"))
            if usage:
                yield _event(texts.last(answers))
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is sent: the stream has to say that it is not whole
            yield _event(error_body(*_fault_of(error)))
        finally:
            asked.cancel()

    def _read(self, rows: Sequence[Any], params: str, source: str) -> list[Row]:
        if not rows:
            return []
        if len(rows) > self._limits.rows:
            raise RequestError(
                f"the request has {len(rows)} rows, more than serve.limits.rows={self._limits.rows}; send fewer",
                413,
            )
        return self._endpoint.rows.read(rows, params, source)

    async def _answer(self, rows: Sequence[Any], params: str, source: str) -> list[Answer]:
        read = self._read(rows, params, source)
        answers = await self._ask(read) if read else []
        self._metrics.rows(answers)
        return answers


async def _json(request: Request) -> Any:
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        raise RequestError("send JSON with `Content-Type: application/json`", 415)
    try:
        return pydantic_core.from_json(await request.body(), allow_inf_nan=False)
    except BodyTooLargeError as error:
        raise RequestError(str(error), 413) from error
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _answered(values: Any) -> Response:
    return Response(pydantic_core.to_json(values, inf_nan_mode="null"), media_type="application/json")


def _event(values: Any) -> bytes:
    return b"data: " + pydantic_core.to_json(values) + b"\n\n"


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that the handler reads itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _fault_of(error: Exception) -> tuple[int, list[str]]:
    """Status and sentences of an error. What no client has caused is named without its details."""
    if isinstance(error, RequestError):
        return error.status, error.faults
    if isinstance(error, HTTPException):
        return error.status_code, [f"{error.detail}; /docs shows what is served"]
    if isinstance(error, HfbatchError):
        return 500, [str(error)]
    return 500, [f"the endpoint has failed with {type(error).__name__}; its log has the details"]


async def _failed(request: Request, error: Exception) -> Response:
    status, faults = _fault_of(error)
    headers = error.headers if isinstance(error, HTTPException) else None
    body = pydantic_core.to_json(error_body(status, faults))
    return Response(body, status, headers, media_type="application/json")
