"""Splits texts into windows: overlapping pieces of a long text, or pairs of a text with each of several others.

For the batching of windows, see hfbatch.runtime.windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.tokens import is_plain, lists_of, tokenize

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TOKENS = ("input_ids", "token_type_ids")
"""Features of a window that models read if their tokenizer returns them."""


def nest(values: Iterable[Sequence[Any]], counts: Sequence[int] | np.ndarray) -> pa.Array:
    """Groups lists of integers, one per window, by row: list<list<int32>>.

    :param counts: number of windows in each row.
    """
    return lists_of(pa.array(list(values), pa.list_(pa.int32())), counts)


def any_of(windows: Sequence[bool] | np.ndarray | None, counts: np.ndarray) -> np.ndarray | None:
    """Returns which rows have any true window, bool [rows]. :param counts: windows of each row, at least 1."""
    if windows is None:
        return None
    return np.logical_or.reduceat(np.asarray(windows, bool), np.cumsum(counts) - counts)


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any], pairs: list[str] | None = None, **options: Any
) -> tuple[BatchEncoding, np.ndarray]:
    """Tokenizes texts in bulk; tokens that exceed a window go into further windows.

    :param texts: strings, or lists of words with `is_split_into_words`.
    :param options: `truncation`, `max_length`, `stride` and other options of the tokenizer, which must be fast.
    :returns: tokens of all windows in order, with offsets; and the text index of each window, int64 [windows].
    """
    encoded = tokenizer(
        texts, pairs, return_overflowing_tokens=True, return_offsets_mapping=True,
        return_special_tokens_mask=True, return_attention_mask=False, verbose=False, **options,
    )  # fmt: skip
    return encoded, np.asarray(encoded["overflow_to_sample_mapping"], np.int64)


@dataclass(frozen=True)
class PairTemplate:
    """Template by which a tokenizer joins two texts: special tokens and token types.

    If a text has many partners, joining tokens is far cheaper than tokenizing both texts again for each pair.
    """

    before: list[int]
    between: list[int]
    behind: list[int]
    types: tuple[list[int], int, list[int], int, list[int]]
    """Token types of: special tokens before, the first text, between, the second text, after."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
        """Derives the template from an encoded pair of texts. :param tokenizer: a fast tokenizer."""
        rust = tokenizer.backend_tokenizer
        rust.no_truncation()
        rust.no_padding()
        pair = rust.encode("a", "a")
        parts = pair.sequence_ids
        first, second = parts.index(0), parts.index(1)
        end, last = second - parts[:second][::-1].index(0), len(parts) - parts[::-1].index(1)
        ids, types = pair.ids, pair.type_ids
        return cls(
            ids[:first], ids[end:second], ids[last:],
            (types[:first], types[first], types[end:second], types[second], types[last:]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.behind)

    def join(self, first: list[int], second: list[int]) -> list[int]:
        """Returns the token ids of a pair."""
        return [*self.before, *first, *self.between, *second, *self.behind]

    def join_types(self, first: int, second: int) -> list[int]:
        """Returns the token types of a pair. :param first: length of the first text; `second`: of the other."""
        before, one, between, other, behind = self.types
        return [*before, *[one] * first, *between, *[other] * second, *behind]


def pair_up(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], partners: list[list[str]], max_length: int | None
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Returns the tokens of each text with each of its partners; truncates the text if a pair exceeds max_length.

    :returns: `input_ids` and, if the model takes them, `token_type_ids` of each pair; whether each was truncated.
    :raises ValueError: for a partner that leaves no room.
    """
    if not is_plain(tokenizer):
        return _pair_up_again(tokenizer, texts, partners, max_length)
    template = PairTemplate.of(tokenizer)
    known = list(dict.fromkeys(other for row in partners for other in row))
    firsts, seconds = (
        tokenize(tokenizer, some, add_special_tokens=False).table["input_ids"].to_pylist()
        for some in (texts, known)
    )
    others = dict(zip(known, seconds, strict=True))
    ids, types, cut = [], [], []
    for first, row in zip(firsts, partners, strict=True):
        for second in (others[other] for other in row):
            room = len(first) if max_length is None else max_length - len(second) - len(template)
            kept = _shortened(first, room, tokenizer.truncation_side)
            ids.append(template.join(kept, second))
            types.append(template.join_types(len(kept), len(second)))
            cut.append(len(kept) < len(first))
    columns = {"input_ids": ids}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = types
    return columns, cut


def _shortened(tokens: list[int], room: int, side: str) -> list[int]:
    """Truncates tokens to the room left. :raises ValueError: if none of several tokens would be left."""
    if len(tokens) > room <= 0:
        raise ValueError("the second text of a pair leaves no room for the first; raise batch.max_length")
    return tokens[:room] if side == "right" else tokens[max(len(tokens) - room, 0) :]


def _pair_up_again(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], partners: list[list[str]], max_length: int | None
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Tokenizes both texts of every pair, for Python tokenizers."""
    firsts = [text for text, row in zip(texts, partners, strict=True) for _ in row]
    seconds = [other for row in partners for other in row]
    options = {"return_attention_mask": False, "verbose": False}
    whole = tokenizer(firsts, seconds, **options)
    cut = [max_length is not None and len(ids) > max_length for ids in whole["input_ids"]]
    columns = {name: list(whole[name]) for name in TOKENS if name in whole}
    for place in np.flatnonzero(cut):
        pair = tokenizer(
            firsts[place], seconds[place], truncation="only_first", max_length=max_length, **options
        )
        for name, values in columns.items():
            values[place] = pair[name]
    return columns, cut
