"""Requests and responses of the OpenAI API: chats, completions and embeddings. Does not import Ray or torch.

Options that change an answer and cannot be honoured are refused by name; none is ignored.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from hfbatch.serve.rows import Answer, RequestError
from hfbatch.tasks.generation.generation_config import SAMPLING_ONLY

WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
"""Options that do not change an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "tools": ([],),
    "parallel_tool_calls": (True,),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
}
"""Options with values that change nothing."""

COLDEST = 1e-3
"""Lower temperatures take the most probable token: logits divided by them have no place in float32."""
MOST_STOPS = 16
Stop = Annotated[str, Field(min_length=1, max_length=200)]
"""A stop string. Their search takes time for each, and for each letter: 20,000 took half a minute."""


class Body(BaseModel):
    """Base class of requests: known options, and all others, which are checked by `refuse_unknown`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None

    def refuse_unknown(self) -> None:
        """:raises RequestError: for options that would change the answer and are not supported."""
        extra = self.model_extra or {}
        unknown = [
            name
            for name, value in extra.items()
            if value is not None and name not in WITHOUT_EFFECT and value not in NEUTRAL.get(name, ())
        ]
        if unknown:
            raise RequestError(
                [f"option {name!r} with this value is not supported; leave it out" for name in unknown]
            )


class StreamOptions(BaseModel):
    """What a stream holds besides texts."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema with a name, which changes nothing."""

    model_config = ConfigDict(extra="ignore")

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def constraint(self) -> dict[str, Any] | None:
        """The param `constraint` that it stands for. :raises RequestError: if the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"json_schema": {"type": "object"}}
        if self.json_schema is None:
            raise RequestError("response_format of type json_schema has no json_schema.schema; add it")
        return {"json_schema": self.json_schema.schema_}


class Generation(Body):
    """Options that chats and completions share."""

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, strict=False)
    top_p: float | None = Field(default=None, gt=0, le=1, strict=False)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def most(self) -> int | None:
        """Maximum of new tokens."""
        return self.max_tokens

    def params(self) -> dict[str, Any]:
        """The params of task text-generation that these options stand for."""
        made: dict[str, Any] = {"details": True, "return_full_text": False}
        if self.most is not None:
            made["max_new_tokens"] = self.most
        if self.temperature is not None:
            made["do_sample"] = self.temperature >= COLDEST
        if self.temperature is not None and self.temperature < COLDEST:
            made |= dict.fromkeys(SAMPLING_ONLY)  # without effect: clients send top_p with temperature 0
        else:
            made |= {
                name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None
            }
        if self.n is not None:
            made["num_return_sequences"] = self.n
        if self.stop:
            made["stop"] = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        if self.response_format and (constraint := self.response_format.constraint()):
            made["constraint"] = constraint
        return made


class Message(BaseModel):
    """A message of a chat; only texts."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]]

    def to_row(self) -> dict[str, str]:
        """Role and text. :raises RequestError: for parts that are not texts, and for calls of tools."""
        extra = [
            name for name, value in (self.model_extra or {}).items() if value is not None and name != "name"
        ]
        if extra:
            raise RequestError(f"a message has {', '.join(extra)}, which is not supported; leave it out")
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        other = {str(part.get("type")) for part in self.content} - {"text"}
        if other:
            raise RequestError(
                f"a message has parts of type {', '.join(sorted(other))}; this model reads text"
            )
        texts = [text for part in self.content if isinstance(text := part.get("text"), str)]
        if len(texts) < len(self.content):
            raise RequestError('a part of a message has no text; write {"type": "text", "text": ...}')
        return {"role": self.role, "content": "".join(texts)}


class ChatRequest(Generation):
    """A chat to answer."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        """Maximum of new tokens, by either name."""
        return self.max_completion_tokens or self.max_tokens

    def rows(self) -> list[dict[str, Any]]:
        """The chat as a row."""
        return [{"messages": [message.to_row() for message in self.messages]}]


class CompletionRequest(Generation):
    """Prompts to continue."""

    prompt: str | Annotated[list[str], Field(min_length=1)]

    def rows(self) -> list[dict[str, Any]]:
        """Each prompt as a row."""
        return [{"text": text} for text in ([self.prompt] if isinstance(self.prompt, str) else self.prompt)]


class EmbeddingRequest(Body):
    """Texts to embed."""

    input: str | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"

    def rows(self) -> list[dict[str, Any]]:
        """Each text as a row."""
        return [{"text": text} for text in ([self.input] if isinstance(self.input, str) else self.input)]


def refuse_rejects(answers: Sequence[Answer]) -> None:
    """:raises RequestError: with the reasons of rejected rows; the API has no place for them beside answers."""
    found = [
        f"{'input' if len(answers) == 1 else f'input {place}'}: {answer.reject.message}"
        for place, answer in enumerate(answers)
        if answer.reject
    ]
    if found:
        raise RequestError(found)


def answers_with(kind: pa.DataType) -> bool:
    """Returns whether the API can answer with a column of embeddings: a vector of float32 in each row."""
    return pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)


def embeddings(
    answers: Sequence[Answer], column: str, request: EmbeddingRequest, model: str
) -> dict[str, Any]:
    """The response with a vector for each text."""

    def encoded(vector: np.ndarray) -> str | list[float]:
        """A vector in the format of the request: numbers, or float32 in little-endian order as base64."""
        if request.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    tokens = sum(answer.tokens for answer in answers)
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": place, "embedding": encoded(answer.vector(column))}
            for place, answer in enumerate(answers)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


class Texts:
    """Builds responses with generated texts.

    :param chat: whether they answer a chat; else they continue prompts.
    :param model: the name of the endpoint.
    """

    def __init__(self, chat: bool, model: str) -> None:
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer], shorten: Callable[[str], str]) -> dict[str, Any]:
        """The response with all texts. :param shorten: leaves out stop strings."""
        found = [choice for answer in answers for choice in choices(answer)]
        made = [
            {
                "index": place,
                "finish_reason": reason if (cut := shorten(text)) == text else "stop",
                "logprobs": None,
                **self._text(cut, "message"),
            }
            for place, (text, reason) in enumerate(found)
        ]
        return {**self._head, "choices": made, "usage": usage(answers)}

    def piece(self, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """An event of a stream. :param first: whether it begins the answer."""
        made = self._text(text, "delta")
        if self._chat and not first:
            made["delta"].pop("role")
        return {**self._events, "choices": [{"index": 0, "finish_reason": reason, "logprobs": None, **made}]}

    def last(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The event with the numbers of tokens."""
        return {**self._events, "choices": [], "usage": usage(answers)}

    @property
    def _events(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _text(self, text: str, name: str) -> dict[str, Any]:
        return {name: {"role": "assistant", "content": text}} if self._chat else {"text": text}


def choices(answer: Answer) -> list[tuple[str, str]]:
    """Text and finish reason of each text of a row."""
    texts, reasons = answer.value("generated_text"), answer.value("finish_reason")
    return [(texts, reasons)] if isinstance(texts, str) else list(zip(texts, reasons, strict=True))


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Numbers of tokens that were read and generated."""
    read = sum(answer.value("prompt_tokens") for answer in answers)
    made = [answer.value("new_tokens") for answer in answers]
    new = sum(sum(count) if isinstance(count, list) else count for count in made)
    return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
