"""Tagged words of texts, from words with a tag each or from spans of characters.

Does not import transformers: the output of tokenizers is passed in as arrays.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hfbatch.train.metrics.spans import OUTSIDE, to_iob2

WORD = re.compile(r"\w+|[^\w\s]")
"""A word of a text that is not split into words: letters and digits, or one other character."""


@dataclass(frozen=True)
class Tagged:
    """A text and its words, in order."""

    text: str
    starts: list[int]
    """Offset of the first character of each word."""
    ends: list[int]
    """Offset after its last character."""
    tags: list[str]
    """Tags in IOB2, or plain."""


def from_words(words: Sequence[str], tags: Sequence[str]) -> Tagged:
    """Joins words with spaces to a text; converts tags in IOB1 or IOB2 to IOB2, plain ones are unchanged."""
    sizes = np.array([len(word) + 1 for word in words])
    ends = np.cumsum(sizes) - 1
    return Tagged(" ".join(words), (ends - sizes + 1).tolist(), ends.tolist(), to_iob2(tags))


def from_spans(text: str, spans: Sequence[Mapping[str, Any]]) -> Tagged:
    """Splits a text into words and tags them by spans, which must not overlap; words are split at span boundaries."""
    spans = sorted(spans, key=lambda span: span["start"])
    edges = sorted(edge for span in spans for edge in (span["start"], span["end"]))
    words: list[tuple[int, int]] = []
    for start, end in (match.span() for match in WORD.finditer(text)):
        words += pairwise([start, *edges[bisect_right(edges, start) : bisect_left(edges, end)], end])
    words = [(start, end) for start, end in words if start < end]
    firsts = [span["start"] for span in spans]
    tags, before = [], -1
    for start, _ in words:
        place = bisect_right(firsts, start) - 1
        inside = place >= 0 and start < spans[place]["end"]
        tags.append(f"{'I' if place == before else 'B'}-{spans[place]['label']}" if inside else OUTSIDE)
        before = place if inside else -1
    return Tagged(text, [start for start, _ in words], [end for _, end in words], tags)


def fault_of_words(words: Sequence[str | None] | None, tags: Sequence[str | None] | None) -> str:
    """Returns the fault of a row of words and tags; empty if there is none."""
    if not words or tags is None:
        return "tags is null" if words else "tokens is null or empty"
    if len(words) != len(tags):
        return f"{len(words)} tokens have {len(tags)} tags; give each token one"
    for name, values in (("token", words), ("tag", tags)):
        for place, value in enumerate(values):
            if not value:
                return f"{name} {place} is {'null' if value is None else 'empty'}"
    return ""


def fault_of_spans(text: str | None, spans: Sequence[Mapping[str, Any] | None] | None) -> str:
    """Returns the fault of a row of a text and spans; empty if there is none."""
    if not text or spans is None:
        return "spans is null; give an empty list where there is none" if text else "text is null or empty"
    places = []
    for span in spans:
        if span is None or span["start"] is None or span["end"] is None or not span["label"]:
            return f"span {span} lacks its start, end or label"
        start, end = span["start"], span["end"]
        if not 0 <= start < end <= len(text):
            return f"span {start} to {end} is outside the text, which has {len(text)} characters, or empty"
        if not text[start:end].strip():
            return f"span {start} to {end} is only whitespace"
        places.append((start, end))
    for (start, end), (after, last) in pairwise(sorted(places)):
        if after < end:
            return f"spans {start} to {end} and {after} to {last} overlap"
    return ""


@dataclass(frozen=True)
class Pieces:
    """Maps the tokens of all windows to words; each array is [tokens]."""

    word: np.ndarray
    """Index of the word over all texts, int64; -1 for tokens of no word."""
    first: np.ndarray
    """Whether it is the word's first token, bool."""
    is_read: np.ndarray
    """Whether the word's tag is read from this token, bool: from one first token of each word; if several windows
    contain the word, the one with the most context on both sides. A word that the tokenizer drops has none."""


def pieces_of(
    texts: Sequence[Tagged], row: np.ndarray, window: np.ndarray, start: np.ndarray, special: np.ndarray
) -> Pieces:
    """Finds the word of each token.

    :param row: the text of each token, int64 [tokens], not decreasing.
    :param window: its window, counted over all texts, int64 [tokens], not decreasing.
    :param start: offset of its first character, int64 [tokens]; may be the space before a word.
    :param special: whether it is not part of the text, bool [tokens].
    """
    base = np.cumsum([0, *(len(text.text) + 1 for text in texts)])
    owner = np.repeat(np.arange(len(texts)), [len(text.ends) for text in texts])
    ends = base[owner] + np.array([end for text in texts for end in text.ends], np.int64)
    start = start + base[row]
    word = np.searchsorted(ends, start, side="right")  # the first word that ends after the token's start
    word[special | (np.append(owner, -1)[word] != row)] = -1
    earliest = np.full(len(ends) + 1, base[-1] + 1)
    np.minimum.at(earliest, word, start)
    begins = (np.diff(word, prepend=-1) != 0) | (np.diff(window, prepend=-1) != 0)
    first = begins & (word >= 0) & (start == earliest[word])
    sizes = np.bincount(window)
    left = np.arange(len(window)) - (np.cumsum(sizes) - sizes)[window]
    context = np.minimum(left, sizes[window] - 1 - left)
    places = np.flatnonzero(first)
    places = places[np.lexsort((-context[places], word[places]))]
    is_read = np.zeros(len(word), bool)
    is_read[places[np.unique(word[places], return_index=True)[1]]] = True
    return Pieces(word, first, is_read)
