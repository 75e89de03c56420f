"""Groups token labels into entities: words, groups of words, over all windows of a text.

Follows transformers' TokenClassificationPipeline, vectorized over all tokens of many texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = ord(" ")


@dataclass(frozen=True)
class Tokens:
    """Concatenated tokens of many windows, without special tokens; each array is [tokens]."""

    row: np.ndarray
    """Index of the token's text, int64, not decreasing."""
    window: np.ndarray
    """Index of the window, counted over all texts, int64, not decreasing."""
    index: np.ndarray
    """Position in the window, int64."""
    id: np.ndarray
    start: np.ndarray | None
    """First character, int64; None if the tokenizer returns no offsets."""
    end: np.ndarray | None
    """End of the token, exclusive, int64."""
    texts: list[str]
    """The texts, by row."""


@dataclass(frozen=True)
class Spans:
    """Labelled runs of adjacent tokens or spans; each array is [spans]."""

    first: np.ndarray
    """Start of each run, int64."""
    stop: np.ndarray
    """End of each run, exclusive, int64."""
    label: np.ndarray
    """Label index, int64."""
    score: np.ndarray

    def take(self, places: np.ndarray) -> Spans:
        """Selects spans, in the order of places."""
        return Spans(self.first[places], self.stop[places], self.label[places], self.score[places])


def continues_word(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Whether each token continues the word of the token before it: bool [tokens].

    Tokenizers that mark such tokens (`##s`) are recognized by tokens longer than their text; with others a word
    begins after a space.
    """
    start, end = tokens.start, tokens.end
    if start is None or end is None:
        return np.zeros(len(tokens.id), bool)
    if getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None):
        ids, place = np.unique(tokens.id, return_inverse=True)
        sizes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())], np.int64)
        inside = sizes[place] != end - start
    else:
        inside = (start > 0) & ~_touches_space(tokens, start)
    return inside & (tokens.id != tokenizer.unk_token_id)


def _touches_space(tokens: Tokens, start: np.ndarray) -> np.ndarray:
    """Whether each token begins with or follows a space."""
    sizes = np.array([len(text) + 1 for text in tokens.texts], np.int64)
    codes = "".join(f"{text}\0" for text in tokens.texts).encode("utf-32-le", "surrogatepass")
    space = np.frombuffer(codes, np.uint32) == SPACE
    at = start + (np.cumsum(sizes) - sizes)[tokens.row]
    return space[at] | space[np.maximum(at - 1, 0)]


def words_of(
    tokens: Tokens, continues: np.ndarray, label: np.ndarray, score: np.ndarray, strategy: str
) -> Spans:
    """Joins tokens into words, with one label each.

    :param continues: see continues_word.
    :param label: each token's best label, int64 [tokens]; not read for strategy average.
    :param score: its score, float32 [tokens]; for strategy average the scores of all labels, [tokens, labels].
    :param strategy: first, max or average: which tokens of a word determine its label.
    """
    first, stop = _runs(~continues, tokens.window)
    if strategy == "average":
        sums = np.add.reduceat(score, first) if len(first) else score
        mean = sums / (stop - first)[:, None]
        return Spans(first, stop, mean.argmax(1), mean.max(1, initial=0))
    chosen = first
    if strategy == "max" and len(first):
        word = np.repeat(np.arange(len(first)), stop - first)
        best = np.flatnonzero(score == np.maximum.reduceat(score, first)[word])
        chosen = best[np.unique(word[best], return_index=True)[1]]
    return Spans(first, stop, label[chosen], score[chosen])


def groups_of(units: Spans, window: np.ndarray, labels: list[str]) -> Spans:
    """Joins adjacent units with the same tag; a label `B-...` begins a group.

    :param units: tokens or words.
    :param window: the window of each unit, int64.
    :returns: spans over units, each with its first unit's label and the mean of scores, float64.
    """
    tags = [name[2:] if name.startswith(("B-", "I-")) else name for name in labels]
    tag = np.array([tags.index(name) for name in tags])[units.label]
    begins = np.array([name.startswith("B-") for name in labels])[units.label]
    begins[1:] |= np.diff(tag) != 0
    first, stop = _runs(begins, window)
    sums = np.add.reduceat(units.score.astype(np.float64), first) if len(first) else np.empty(0)
    return Spans(first, stop, units.label[first], sums / (stop - first))


def _runs(begins: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns start and exclusive end of each run; each window begins a run too."""
    first = np.flatnonzero(begins | (np.diff(window, prepend=-1) != 0))
    return first, np.append(first[1:], len(begins)) if len(first) else first


def strings_of(tokens: Tokens, places: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns tokens as strings; for an unknown token, its text."""
    ids = tokens.id[places]
    found = tokenizer.convert_ids_to_tokens(ids.tolist())
    if tokens.start is not None and tokens.end is not None:
        for k in np.flatnonzero(ids == tokenizer.unk_token_id):
            place = places[k]
            found[k] = tokens.texts[tokens.row[place]][tokens.start[place] : tokens.end[place]]
    return found


def text_of(tokens: Tokens, units: Spans, over_words: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of adjacent tokens or words, as the tokenizer joins them."""
    if not over_words:
        return tokenizer.convert_tokens_to_string(strings_of(tokens, units.first, tokenizer))
    words = [np.arange(first, stop) for first, stop in zip(units.first, units.stop, strict=True)]
    strings = [tokenizer.convert_tokens_to_string(strings_of(tokens, word, tokenizer)) for word in words]
    return tokenizer.convert_tokens_to_string(strings)


def without_overlaps(row: np.ndarray, start: np.ndarray, end: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Keeps the longest of overlapping entities, or the one with the best score; returns indices in order of start.

    :param row: the text index of each entity, int64, not decreasing.
    """
    kept: list[int] = []
    for place in np.lexsort((start, row)):
        if kept and row[kept[-1]] == row[place] and start[place] < end[kept[-1]]:
            last, size = kept[-1], end[place] - start[place]
            if (size, score[place]) > (end[last] - start[last], score[last]):
                kept[-1] = int(place)
        else:
            kept.append(int(place))
    return np.array(kept, np.int64)
