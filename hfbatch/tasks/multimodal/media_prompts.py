"""Prompts and chats with images and audio: converts columns to inputs of processors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from hfbatch.data.media import is_file_like
from hfbatch.tasks.tokens import is_text

Openers = Mapping[str, Callable[[Any], Any]]
"""Maps a media type, such as image, to the decoder of its values."""


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_media(is_one: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    """Returns a test for columns that hold a file, or a list of files, per row.

    :param is_one: returns whether an Arrow type holds a file.
    """
    return lambda kind: is_one(kind.value_type if _is_list(kind) else kind)


is_images = is_media(is_file_like)


def is_typed_chat(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds messages: a role, and as content a string or parts with a type."""
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    message = kind.value_type
    if message.get_field_index("role") < 0 or message.get_field_index("content") < 0:
        return False
    content = message.field("content").type
    if not is_text(message.field("role").type) or is_text(content):
        return is_text(message.field("role").type)
    is_parts = _is_list(content) and pa.types.is_struct(content.value_type)
    return is_parts and content.value_type.get_field_index("type") >= 0


def opened(value: Any, opener: Callable[[Any], Any]) -> list[Any]:
    """Decodes the files of a row: a single file or a list."""
    return [opener(one) for one in (value if isinstance(value, list) else [value])]


def filled(
    chat: list[dict[str, Any]], given: Mapping[str, list[Any]], openers: Openers
) -> list[dict[str, Any]]:
    """Returns a chat with its media decoded.

    A part such as `{type: image}` holds its file under `image`, `path` or `url`, or takes the next of the given media.
    If no part refers to a media type, the given media of this type come first in the user's first message.

    :param given: maps media types to the decoded media of the row outside its messages.
    :param openers: decoders of the media types that the model takes.
    :raises ValueError: for a chat without messages, roles or content, and for parts and media that do not match.
    """
    if not chat:
        raise ValueError("messages is empty")
    waiting = {kind: deque(values) for kind, values in given.items()}
    messages = [_filled_message(message, waiting, openers) for message in chat]
    for kind, rest in waiting.items():
        if not rest:
            continue
        if len(rest) < len(given[kind]):
            raise ValueError(
                f"the row has {len(given[kind])} of {kind}, {len(rest)} more than its messages refer to"
            )
        _put_first(messages, [{"type": kind, kind: one} for one in rest])
    return messages


def _filled_message(
    message: Mapping[str, Any] | None, waiting: Mapping[str, deque[Any]], openers: Openers
) -> dict[str, Any]:
    for name in ("role", "content"):
        if not message or message.get(name) is None:
            raise ValueError(f"a message has no {name}")
    content = message["content"] if message else ""
    if not isinstance(content, str):
        content = [_filled_part(part, waiting, openers) for part in content]
    return {**(message or {}), "content": content}


def _filled_part(
    part: Mapping[str, Any], waiting: Mapping[str, deque[Any]], openers: Openers
) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": kind, "text": part.get("text") or ""}
    if kind not in openers:
        raise ValueError(
            f"a message has a part of type {kind!r}; this model takes text, {', '.join(openers)}"
        )
    sources: Iterator[Any] = (part[name] for name in (kind, "path", "url") if part.get(name))
    source = next(sources, None)
    if source is not None:
        return {"type": kind, kind: openers[kind](source)}
    if not waiting.get(kind):
        raise ValueError(f"the messages refer to more of {kind} than the row has")
    return {"type": kind, kind: waiting[kind].popleft()}


def _put_first(messages: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    asked = next((message for message in messages if message["role"] == "user"), None)
    if asked is None:
        raise ValueError("no message has role user")
    said = asked["content"]
    asked["content"] = [*parts, *([{"type": "text", "text": said}] if isinstance(said, str) else said)]
