"""Chats: columns of messages, and their rendering into prompts with a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.tokens import is_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES_WANTED = "list<struct<role: string, content: string>>"
"""The type of a column of chats, for errors and help."""
RESERVED = frozenset(
    (
        *("conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"),
    )
)
"""Arguments that params.chat_template_kwargs may not set, since the task sets them."""


class ChatParams(base.Params):
    """Options for rendering chats into prompts."""

    add_generation_prompt: bool | None = None
    """Append the start of an answer to the prompt; null: unless the last message is continued."""
    continue_final_message: bool | None = None
    """Continue the last message instead of answering it; null: if it is the assistant's."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Variables of the model's chat template, such as {enable_thinking: false}."""


def is_chat(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of messages with a role and a content."""
    return is_structs(kind) and all(
        kind.value_type.get_field_index(name) >= 0 and is_text(kind.value_type.field(name).type)
        for name in ("role", "content")
    )


def is_tools(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds JSON, or lists of functions as structs."""
    return is_text(kind) or is_structs(kind)


def is_structs(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of structs."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def chat_faults(tokenizer: PreTrainedTokenizerBase, model: str, tools: bool) -> list[str]:
    """Returns errors if a tokenizer cannot render chats.

    :param tools: whether there is a column of tools.
    """
    if not tokenizer.chat_template:
        return [
            f"model {model!r} has no chat template, so it cannot read messages; "
            "choose an instruct model, or give prompts with --column text=COLUMN"
        ]
    if tools and "tools" not in str(tokenizer.chat_template):
        return [
            f"the chat template of model {model!r} takes no tools; choose a model that calls functions, "
            "or leave input.columns.tools out"
        ]
    return []


def option_faults(params: ChatParams) -> list[str]:
    """Returns errors for contradictory chat options."""
    faults = []
    if params.add_generation_prompt and params.continue_final_message:
        faults.append(
            "params.add_generation_prompt and continue_final_message are both true; "
            "set only one: to start an answer, or to continue the last message"
        )
    taken = sorted(RESERVED & set(params.chat_template_kwargs))
    if taken:
        faults.append(
            f"params.chat_template_kwargs cannot set {', '.join(taken)}, which the task sets; leave out"
        )
    return faults


def check_messages(messages: pa.Array) -> None:
    """Checks messages. :raises ValueError: for an empty chat, and a message that is null or has no role or content.

    Content may be null where messages have more fields, such as the tool calls of an assistant.
    """
    if pc.any(pc.equal(pc.list_value_length(messages), 0)).as_py():
        raise ValueError("messages is empty")
    flat = messages.flatten()
    if flat.null_count:
        raise ValueError("messages holds a null message")
    needed = ("role", "content") if flat.type.num_fields == 2 else ("role",)
    for name in needed:
        if pc.struct_field(flat, name).null_count:
            raise ValueError(f"a message has no {name}")


def render(
    tokenizer: PreTrainedTokenizerBase, params: ChatParams, columns: Mapping[str, pa.Array]
) -> list[str]:
    """Renders each chat of column `messages` with the template, with the functions of `tools` if there are any.

    :raises ValueError: for invalid messages and tools.
    :raises jinja2.TemplateError: for a chat that the template rejects.
    """
    check_messages(columns["messages"])
    chats = columns["messages"].to_pylist()
    tools = read_tools(columns["tools"]) if "tools" in columns else [None] * len(chats)
    texts = []
    for chat, functions in zip(chats, tools, strict=True):
        goes_on = continues(params, chat)
        asks = not goes_on if params.add_generation_prompt is None else params.add_generation_prompt
        texts.append(
            tokenizer.apply_chat_template(
                [plain(message, "content") for message in chat],
                tools=functions,
                tokenize=False,
                add_generation_prompt=asks and not goes_on,
                continue_final_message=goes_on,
                **params.chat_template_kwargs,
            )
        )
    return texts


def continues(params: ChatParams, chat: list[dict[str, Any]]) -> bool:
    """Whether the answer continues the chat's last message."""
    if params.continue_final_message is not None:
        return params.continue_final_message
    return chat[-1]["role"] == "assistant" and not params.add_generation_prompt


def answered(params: ChatParams, chat: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Returns a chat with the reply appended, or joined to the message that it continues."""
    *earlier, last = chat
    if continues(params, chat):
        return [*earlier, {"role": last["role"], "content": (last["content"] or "") + text}]
    return [*chat, {"role": "assistant", "content": text}]


def read_tools(column: pa.Array) -> list[list[Any] | None]:
    """Returns the functions of each row, from JSON or structs; None for an empty list or text and for a null.

    :raises ValueError: for text that is not a JSON list.
    """
    rows: list[list[Any] | None] = []
    for value in column.to_pylist():
        functions = json.loads(value or "[]") if isinstance(value, str) else plain(value or [])
        if not isinstance(functions, list):
            raise ValueError(f"tools is a JSON {type(functions).__name__}, not a list of functions")
        rows.append(functions or None)
    return rows


def plain(value: Any, *kept: str) -> Any:
    """Removes null struct fields, which Arrow adds to rows that lack them.

    :param kept: fields to keep even if null.
    """
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None or key in kept}
    return [plain(inner) for inner in value] if isinstance(value, list) else value
