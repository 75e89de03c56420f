"""How labels of tokens become entities: words, groups of words, and the windows of one text put together.

Follows transformers' TokenClassificationPipeline, on arrays of all tokens of many texts at once.
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
    """Tokens of many windows end to end, special ones left out; each array is [tokens]."""

    row: np.ndarray
    """The text that a token is of, int64, not decreasing."""
    window: np.ndarray
    """The window, counted over all texts, int64, not decreasing."""
    index: np.ndarray
    """Place in its window, int64."""
    id: np.ndarray
    start: np.ndarray | None
    """First character, int64; None where the tokenizer does not tell."""
    end: np.ndarray | None
    """One behind the last character, int64."""
    texts: list[str]
    """The texts, by row."""


@dataclass(frozen=True)
class Spans:
    """Runs of neighbours among tokens, or among other spans, with a label each; each array is [spans]."""

    first: np.ndarray
    """The first of a run, int64."""
    stop: np.ndarray
    """One behind its last, int64."""
    label: np.ndarray
    """A number, int64."""
    score: np.ndarray

    def take(self, places: np.ndarray) -> Spans:
        """Some of the spans, in the order of places."""
        return Spans(self.first[places], self.stop[places], self.label[places], self.score[places])


def continues_word(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Whether a token goes on with the word of the one before it: bool [tokens].

    Tokenizers that mark such tokens (`##s`) are told by tokens longer than their text; with others a word begins
    behind a space.
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
    """Whether a token begins with a space or stands behind one."""
    sizes = np.array([len(text) + 1 for text in tokens.texts], np.int64)
    codes = "".join(f"{text}\0" for text in tokens.texts).encode("utf-32-le", "surrogatepass")
    space = np.frombuffer(codes, np.uint32) == SPACE
    at = start + (np.cumsum(sizes) - sizes)[tokens.row]
    return space[at] | space[np.maximum(at - 1, 0)]


def words_of(
    tokens: Tokens, continues: np.ndarray, label: np.ndarray, score: np.ndarray, strategy: str
) -> Spans:
    """Tokens joined to words, with one label each.

    :param continues: see continues_word.
    :param label: each token's best label, int64 [tokens]; for strategy average not read.
    :param score: its score, float32 [tokens]; for strategy average the scores of all labels, [tokens, labels].
    :param strategy: first, max or average: which tokens of a word tell its label.
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
    """Neighbours of one tag joined; a label `B-...` begins a group.

    :param units: tokens or words.
    :param window: of each unit, int64.
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
    """First and one behind the last of each run; each window begins a run too."""
    first = np.flatnonzero(begins | (np.diff(window, prepend=-1) != 0))
    return first, np.append(first[1:], len(begins)) if len(first) else first


def strings_of(tokens: Tokens, places: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens as strings; an unknown one as what stands in the text."""
    ids = tokens.id[places]
    found = tokenizer.convert_ids_to_tokens(ids.tolist())
    if tokens.start is not None and tokens.end is not None:
        for k in np.flatnonzero(ids == tokenizer.unk_token_id):
            place = places[k]
            found[k] = tokens.texts[tokens.row[place]][tokens.start[place] : tokens.end[place]]
    return found


def text_of(tokens: Tokens, units: Spans, over_words: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of neighbouring tokens or words, as the tokenizer puts it together."""
    if not over_words:
        return tokenizer.convert_tokens_to_string(strings_of(tokens, units.first, tokenizer))
    words = [np.arange(first, stop) for first, stop in zip(units.first, units.stop, strict=True)]
    strings = [tokenizer.convert_tokens_to_string(strings_of(tokens, word, tokenizer)) for word in words]
    return tokenizer.convert_tokens_to_string(strings)


def without_overlaps(row: np.ndarray, start: np.ndarray, end: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Of entities that overlap, the longest, or the one of the best score: places in order of start.

    :param row: the text of each entity, int64, not decreasing.
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
