"""Chats as training data: the text that a chat template renders, and which of its tokens are the assistant's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfbatch.tasks.generation.chat import plain
from hfbatch.tasks.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks the assistant's text in a chat template."""
Message = dict[str, Any]
Span = tuple[int, int]
"""Start and end of an answer, in characters."""


def find_answers(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Renders a chat up to its last answer with the tokenizer's template; returns the text and the answers' spans.

    Answers are the text that the template marks with {% generation %}, else the text that it adds to the prompt for
    each turn of the assistant, including the end of the turn.

    :param options: variables of the template.
    :raises ValueError: if there is no answer, or answers cannot be distinguished from the rest.
    :raises jinja2.TemplateError: if the template refuses the chat.
    """
    turns = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("messages has no turn of the assistant, so there is nothing to train on")
    messages = [plain(message, "content") for message in chat[: turns[-1] + 1]]
    if MARKED.search(tokenizer.get_chat_template()):
        return _marked(tokenizer, messages, options)
    if turns[0] == 0:
        raise ValueError(
            "messages begins with a turn of the assistant; leave it out, or put a user's turn before it"
        )

    def render(count: int, asks: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=asks, **options
        )

    text = render(len(messages))
    edges = [(render(turn, True), render(turn + 1)) for turn in turns]
    if not all(text.startswith(edge) for pair in edges for edge in pair):
        raise ValueError(
            "the chat template renders a turn differently if others follow, so answers cannot be located; split the "
            "chat into one for each answer, or use a template with {% generation %}"
        )
    return text, [(len(before), len(after)) for before, after in edges]


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], options: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Renders a chat and locates its answers with a template that marks them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [[plain(message) for message in messages]],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return texts[0], [(start, end) for start, end in spans[0]]


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[Span]]
) -> list[tuple[list[int], np.ndarray]]:
    """Returns the token ids of each chat, and which of them belong to answers, bool [tokens].

    An answer begins where the tokens of the whole text first differ from those of the text before it, which is the
    prompt at prediction; a token that spans the boundary belongs to the text after it.
    """
    edges = [text[:edge] for text, found in zip(texts, spans, strict=True) for span in found for edge in span]
    wholes, heads = (
        tokenize(tokenizer, some, add_special_tokens=False).table["input_ids"].to_pylist()
        for some in (texts, edges)
    )
    head, chats = iter(heads), []
    for ids, found in zip(wholes, spans, strict=True):
        targets = np.zeros(len(ids), bool)
        for _ in found:
            start, end = shared(ids, next(head)), shared(ids, next(head))
            targets[start:end] = True
        chats.append((ids, targets))
    return chats


def shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Returns the length of the common prefix of two token lists."""
    size = min(len(ids), len(others))
    differing = np.flatnonzero(np.asarray(ids[:size]) != np.asarray(others[:size]))
    return int(differing[0]) if len(differing) else size
