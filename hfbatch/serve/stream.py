"""A text that is sent while it is generated. Does not import Ray or torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What decoding gives for the first bytes of a character."""
LONGEST_CLEANED = len(" n't")
"""Letters of the longest text that transformers shortens by a space, where a tokenizer has `clean_up_tokenization_spaces`."""


def cut_at(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop string: the OpenAI API leaves stop strings out, generation includes them."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class TextStream:
    """Turns tokens into pieces of text, whose concatenation is the text of the whole answer.

    Text that may be the beginning of a stop string, bytes of an unfinished character, and spaces that decoding may
    still remove are held back.

    :param task: with `tokenizer` and `decoding`.
    """

    def __init__(self, task: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = task.tokenizer, stops
        ends = task.decoding.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else {*(ends or ())}
        cleaned = LONGEST_CLEANED if task.tokenizer.clean_up_tokenization_spaces else 0
        self._held = max(cleaned, *(len(stop) - 1 for stop in stops), 0)
        self._tokens: list[int] = []
        self._ended = False
        self.sent = ""

    def add(self, token: int) -> str:
        """Takes the next token; returns what can be sent. Tokens after the end of the text are padding."""
        self._ended = self._ended or token in self._ends
        if self._ended:
            return ""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        shown = cut_at(text, self._stops)
        if shown == text:
            shown = text[: max(len(text) - self._held, 0)]
        return "" if text.endswith(UNFINISHED) else self._send(shown)

    def rest(self, text: str) -> str:
        """Returns what is left of the whole text. :param text: without its stop string."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self.sent):
            return ""  # decoding has changed what was sent
        piece = text[len(self.sent) :]
        self.sent += piece
        return piece
