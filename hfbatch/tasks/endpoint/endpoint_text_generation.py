"""Task endpoint-text-generation: text-generation by a model that somebody serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jsonschema
import numpy as np
import pyarrow as pa
from pydantic import Field
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from hfbatch.engines.base import Call, token_count
from hfbatch.tasks.base import Example, Features, InputColumn
from hfbatch.tasks.endpoint.base import EndpointParams, EndpointTask
from hfbatch.tasks.generation.chat import MESSAGE, MESSAGES_WANTED, check_messages, is_chat, plain
from hfbatch.tasks.generation.constraint import ConstraintSpec, with_schema
from hfbatch.tasks.generation.json_values import Column, parser_of
from hfbatch.tasks.generation.text_generation_base import DETAILS, GeneratingTask
from hfbatch.tasks.tokens import text_column

CHATS = "/v1/chat/completions"
PROMPTS = "/v1/completions"
UNKNOWN = -1
"""In place of a number of tokens that the answer does not state."""


class UnusableText(ValueError):
    """An answer that does not satisfy its constraint."""


class EndpointTextGeneration(EndpointTask):
    """Continues each prompt of column `text`, or answers each chat of column `messages`, by engine http.

    Requests go to /v1/completions or /v1/chat/completions. Where the endpoint samples (temperature is not 0), each row has a
    seed of its own, which not every endpoint follows. A row that the endpoint refuses is a reject with its message.

    With `constraint`, the JSON Schema is sent as `response_format`, and the answer is checked against it.
    """

    class Params(EndpointParams):
        """Null leaves an option to the endpoint."""

        max_new_tokens: int | None = Field(default=None, ge=1)
        """Maximum of tokens of an answer, sent as max_tokens."""
        do_sample: bool | None = None
        """false: the most probable tokens, sent as temperature 0."""
        temperature: float | None = Field(default=None, ge=0)
        """Temperature of sampling."""
        top_p: float | None = Field(default=None, gt=0, le=1)
        """Samples among the most probable tokens with this total probability."""
        stop: tuple[str, ...] = ()
        """Texts that end an answer, which does not contain them."""
        seeds: bool = True
        """Whether requests that sample carry a seed; false for endpoints that refuse the field."""
        return_full_text: bool | None = None
        """Return the prompt or messages followed by the answer (true, also if null), or only the answer."""
        details: bool = False
        """Add columns finish_reason, prompt_tokens and new_tokens."""
        constraint: ConstraintSpec | None = None
        """What the answer must be: {json_schema: ...}."""

    params: Params
    name = "endpoint-text-generation"
    summary = "Continue prompts or answer chats with a model that an endpoint serves"
    outputs: ClassVar[Mapping[str, str]] = {
        "generated_text": "string for prompts; messages for chats, unless return_full_text is false",
        "parsed": "the answer as a value, as the JSON Schema of params.constraint says",
        "finish_reason": "string, as the endpoint states it, such as stop or length; with params.details",
        "prompt_tokens": "int32, null where the endpoint does not count; with params.details",
        "new_tokens": "int32, likewise; with params.details",
    }
    inputs = (
        text_column("text", required=False),
        InputColumn("messages", is_chat, MESSAGES_WANTED, required=False, rendered_by="messages"),
    )
    exclusive = ("text", "messages")
    sets = frozenset(
        ("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "n")
    )
    histogram = GeneratingTask.histogram
    EXAMPLE = Example({"text": ["Every large cluster"]}, {"max_new_tokens": 8, "do_sample": False})

    @classmethod
    def read_files(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Reads the file of a JSON Schema."""
        return with_schema(params)

    def check(self) -> list[str]:
        """Returns errors in the options."""
        faults, params = super().check(), self.params
        if params.do_sample is False and params.temperature:
            faults.append(
                f"params.do_sample=false goes with temperature 0, not {params.temperature:g}; leave one of them out"
            )
        if params.do_sample and params.temperature == 0:
            faults.append("params.do_sample=true needs a temperature above 0; leave one of them out")
        if not params.constraint:
            return faults
        if params.constraint.json_schema is None:
            faults.append(
                "params.constraint: an endpoint takes a json_schema; give choices as an enum in one, or run the model with "
                "engine torch"
            )
            return faults
        try:
            jsonschema.Draft202012Validator.check_schema(self.schema)
        except jsonschema.SchemaError as error:
            faults.append(f"params.constraint.json_schema is no JSON Schema: {error.message}")
        else:
            root = DRAFT202012.create_resource(self.schema)
            faults += [
                f"params.constraint.json_schema refers to {name!r}, which it does not hold, and nothing is fetched; put that "
                "schema into $defs"
                for name in _unknown(root, Registry().resolver_with_root(root))
            ]
        if "response_format" in params.body:
            faults.append(
                "params.body sets response_format, and so does params.constraint; leave one of them out"
            )
        return faults

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error unless there is exactly one of `text` and `messages`."""
        if len(present & {*self.exclusive}) == 1:
            return []
        if present:
            return [
                "columns 'text' and 'messages' are both in input; "
                "name the one to read: --column text=text or --column messages=messages"
            ]
        return ["input has no prompts and no chats; use --column text=COLUMN or --column messages=COLUMN"]

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of answers, with objects closed."""
        return self.params.constraint.closed_schema if self.params.constraint else {}

    @cached_property
    def validator(self) -> jsonschema.Draft202012Validator:
        """Checks values against the schema. The registry is empty, since the default one fetches what a schema refers to."""
        return jsonschema.Draft202012Validator(self.schema, registry=Registry())

    @cached_property
    def parser(self) -> Column | None:
        """Type and parser of column `parsed`, if there is one."""
        return parser_of(self.params.constraint)

    def notes(self) -> list[str]:
        """Returns notes on what is left to the endpoint."""
        left = {"max_new_tokens": self.params.max_new_tokens, "temperature": self._temperature}
        names = [name for name, value in left.items() if value is None]
        return [f"left to the endpoint: params.{' and params.'.join(names)}"] if names else []

    def output_fields(self) -> list[pa.Field]:
        """`generated_text` for prompts."""
        return self.fields_for({"text"})

    def fields_for(self, present: set[str]) -> list[pa.Field]:
        """`generated_text`: string, or list<struct<role, content>> for whole chats; then `parsed` and the details."""
        whole = "messages" in present and self._full_text
        kinds = {"generated_text": pa.list_(MESSAGE) if whole else pa.string()}
        if self.parser:
            kinds["parsed"] = self.parser[0]
        kinds |= DETAILS if self.params.details else {}
        return [pa.field(name, kind) for name, kind in kinds.items()]

    @property
    def _full_text(self) -> bool:
        return self.params.return_full_text is not False

    @property
    def _temperature(self) -> float | None:
        return 0.0 if self.params.do_sample is False else self.params.temperature

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns `prompt`, the text or the messages as JSON, and a `seed` for each row when sampling.

        :raises ValueError: for a chat without messages, roles or content, and for an empty prompt.
        """
        if "messages" in columns:
            check_messages(columns["messages"])
            chats = columns["messages"].to_pylist()
            prompts = [[plain(message, "content") for message in chat] for chat in chats]
        else:
            prompts = columns["text"].cast(pa.string()).to_pylist()
            if "" in prompts:
                raise ValueError("the prompt is empty")
        made = {
            "prompt": pa.array([json.dumps(one, ensure_ascii=False) for one in prompts], pa.large_string())
        }
        if self._temperature != 0 and self.params.seeds:
            made["seed"] = pa.array(map(self._seed, *places.to_pydict().values()), pa.int64())
        return Features(pa.table(made))

    def _seed(self, file: str, row: int) -> int:
        """The seed of a row: 31 bits, which every endpoint takes."""
        digest = hashlib.blake2b(f"{self.seed}:{file}:{row}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1

    @cached_property
    def _options(self) -> dict[str, Any]:
        params = self.params
        options: dict[str, Any] = {
            "max_tokens": params.max_new_tokens,
            "temperature": self._temperature,
            "top_p": params.top_p,
            "stop": list(params.stop) or None,
        }
        if params.constraint:
            named = {"name": "answer", "schema": self.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        given = {name: value for name, value in options.items() if value is not None}
        return {"model": self.model.name, **given, **params.body}

    def requests(self, features: pa.Table) -> list[Call]:
        """Returns the call of each row."""
        calls = []
        for row in features.to_pylist():
            prompt = json.loads(row["prompt"])
            chat = isinstance(prompt, list)
            body = {**self._options, "messages" if chat else "prompt": prompt}
            if "seed" in row:
                body["seed"] = row["seed"]
            calls.append(Call(CHATS if chat else PROMPTS, body, read_text))
        return calls

    def outputs_of(self, requests: Sequence[Call], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns `text` and `finish_reason` as lists of UTF-8, `prompt_tokens` and `new_tokens` int32 [rows]."""
        return {
            "text": [answer["text"] for answer in answers],
            "finish_reason": [answer["finish_reason"] for answer in answers],
            "prompt_tokens": np.array([answer["prompt_tokens"] for answer in answers], np.int32),
            "new_tokens": np.array([answer["new_tokens"] for answer in answers], np.int32),
        }

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns `generated_text`, `parsed` and the details.

        :raises UnusableText: for a row with a text that does not satisfy its constraint.
        """
        texts = outputs["text"].cast(pa.string()).to_pylist()
        reasons = outputs["finish_reason"].cast(pa.string())
        if not self._full_text:
            made = [pa.array(texts, pa.string())]
        elif "messages" in columns:
            chats = columns["messages"].to_pylist()
            whole = [
                [*chat, {"role": "assistant", "content": text}]
                for chat, text in zip(chats, texts, strict=True)
            ]
            made = [pa.array(whole, pa.list_(MESSAGE))]
        else:
            prompts = columns["text"].cast(pa.string()).to_pylist()
            made = [pa.array([a + b for a, b in zip(prompts, texts, strict=True)], pa.string())]
        if self.parser:
            kind, parse = self.parser
            values = [
                parse(self._valid(text, reason))
                for text, reason in zip(texts, reasons.to_pylist(), strict=True)
            ]
            made.append(pa.array(values, kind))
        if self.params.details:
            counts = (outputs[name].combine_chunks() for name in ("prompt_tokens", "new_tokens"))
            made += [reasons.combine_chunks(), *(_known(count) for count in counts)]
        return made

    def _valid(self, text: str, reason: str) -> str:
        """Returns a text that satisfies the schema. :raises UnusableText: for another one."""
        try:
            self.validator.validate(json.loads(text, parse_constant=_refuse))
        except (ValueError, RecursionError, jsonschema.ValidationError) as error:
            fault = error.message if isinstance(error, jsonschema.ValidationError) else str(error)
            cut = "; is params.max_new_tokens enough?" if reason == "length" else ""
            raise UnusableText(
                f"the answer does not satisfy params.constraint: {fault}{cut} {text}"
            ) from None
        return text

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of new tokens per row, 0 where the endpoint does not count."""
        return np.maximum(outputs["new_tokens"].to_numpy(), 0)


def _known(counts: pa.Array) -> pa.Array:
    return pa.array(counts.to_numpy(), pa.int32(), mask=counts.to_numpy() == UNKNOWN)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unknown(schema: Resource[Any], resolver: Any) -> Iterator[str]:
    """Yields the references of a schema, and of those in it, that lead to nothing.

    :param resolver: of referencing, for the schema.
    """
    if isinstance(schema.contents, Mapping):
        for key in {"$ref", "$dynamicRef"} & schema.contents.keys():
            try:
                resolver.lookup(schema.contents[key])
            except (Unresolvable, ValueError, TypeError):  # the others for a path through a list or a scalar
                yield schema.contents[key]
    for inner in schema.subresources():
        yield from _unknown(inner, resolver.in_subresource(inner))


def read_text(body: Any) -> dict[str, Any]:
    """Reads the first choice of an answer: text and finish_reason as UTF-8, prompt_tokens, new_tokens.

    :raises ValueError: if it holds no text, for example a refusal or calls of tools, or one with half of a surrogate pair.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("it has no choices")
    choice = choices[0]
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    reason = choice.get("finish_reason") or ""
    if not isinstance(text, str) or not isinstance(reason, str) or reason == "content_filter":
        refusal = message.get("refusal") if isinstance(message, dict) else None
        raise ValueError(
            refusal if isinstance(refusal, str) else f"it has no text; finish_reason is {reason!r}"
        )
    counts = {"prompt_tokens": "prompt_tokens", "completion_tokens": "new_tokens"}
    known = {
        known_as: UNKNOWN if (number := token_count(body.get("usage"), name)) is None else number
        for name, known_as in counts.items()
    }
    return {"text": text.encode(), "finish_reason": reason.encode(), **known}
