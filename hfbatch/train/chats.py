"""Chats to learn from: the text that a chat template writes, and which of its tokens the assistant is to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfbatch.tasks.parts.chat import plain
from hfbatch.tasks.parts.text import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant writes."""
Message = dict[str, Any]
Span = tuple[int, int]
"""Where an answer begins and ends, in characters."""


def find_answers(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], options: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """A chat up to its last answer, as the tokenizer's template writes it, and where the answers are.

    They are what the template marks with {% generation %}, else what it adds to a prompt for each turn of the
    assistant: what ends the turn is learnt along.

    :param options: variables of the template.
    :raises ValueError: for a chat without answers, and one in which they cannot be told from the rest.
    :raises jinja2.TemplateError: for a chat that the template refuses.
    """
    turns = [place for place, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("messages has no turn of the assistant, so there is nothing to learn")
    messages = [plain(message, "content") for message in chat[: turns[-1] + 1]]
    if MARKED.search(tokenizer.get_chat_template()):
        return _marked(tokenizer, messages, options)
    if turns[0] == 0:
        raise ValueError("messages begins with the assistant, whom nobody has asked; leave its turn out")

    def render(count: int, asks: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=asks, **options
        )

    text = render(len(messages))
    edges = [(render(turn, True), render(turn + 1)) for turn in turns]
    if not all(text.startswith(edge) for pair in edges for edge in pair):
        raise ValueError(
            "the chat template writes a turn differently once others follow, so answers cannot be told from the "
            "rest; split the chat into one for each answer, or take a template with {% generation %}"
        )
    return text, [(len(before), len(after)) for before, after in edges]


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], options: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """A chat and its answers by a template that marks them."""
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
    """Token ids of each chat, and which of them are of answers, bool [tokens].

    An answer begins where the tokens of the whole first differ from those of what comes before it alone, which
    is the prompt at prediction; a token that holds the ends of both is of what follows.
    """
    edges = [text[:edge] for text, found in zip(texts, spans, strict=True) for span in found for edge in span]
    wholes, heads = (
        tokenize(tokenizer, some, add_special_tokens=False).table["input_ids"].to_pylist()
        for some in (texts, edges)
    )
    head, chats = iter(heads), []
    for ids, found in zip(wholes, spans, strict=True):
        learnt = np.zeros(len(ids), bool)
        for _ in found:
            start, end = shared(ids, next(head)), shared(ids, next(head))
            learnt[start:end] = True
        chats.append((ids, learnt))
    return chats


def shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two rows have in common before they differ or one ends."""
    size = min(len(ids), len(others))
    differing = np.flatnonzero(np.asarray(ids[:size]) != np.asarray(others[:size]))
    return int(differing[0]) if len(differing) else size
