"""Texts as windows: the strided pieces of a long one, or one text paired with each of several others.

Knows nothing of what a model makes of them. How windows are batched is the business of hfbatch.compute.windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.parts.text import is_plain, lists_of, tokenize

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

TOKENS = ("input_ids", "token_type_ids")
"""Features of a window that every model reads whose tokenizer makes them."""


def nest(values: Iterable[Sequence[Any]], counts: Sequence[int] | np.ndarray) -> pa.Array:
    """Lists of integers, one for each window, as a list for each row: list<list<int32>>.

    :param counts: windows of each row.
    """
    return lists_of(pa.array(list(values), pa.list_(pa.int32())), counts)


def any_of(windows: Sequence[bool] | np.ndarray | None, counts: np.ndarray) -> np.ndarray | None:
    """Which rows have a window of which something is true, bool [rows]. :param counts: windows of each, none 0."""
    if windows is None:
        return None
    return np.logical_or.reduceat(np.asarray(windows, bool), np.cumsum(counts) - counts)


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any], pairs: list[str] | None = None, **options: Any
) -> tuple[BatchEncoding, np.ndarray]:
    """Tokenises texts in bulk; what does not fit in a window goes into further ones.

    :param texts: strings, or lists of words with `is_split_into_words`.
    :param options: `truncation`, `max_length`, `stride` and others of the tokenizer, which must be a fast one.
    :returns: tokens of all windows in order, with offsets; and the text that each is of, int64 [windows].
    """
    encoded = tokenizer(
        texts, pairs, return_overflowing_tokens=True, return_offsets_mapping=True,
        return_special_tokens_mask=True, return_attention_mask=False, verbose=False, **options,
    )  # fmt: skip
    return encoded, np.asarray(encoded["overflow_to_sample_mapping"], np.int64)


@dataclass(frozen=True)
class PairTemplate:
    """How a tokenizer joins two texts: special tokens and the type of every token.

    Joining tokens costs far less than tokenising both texts again for each pair, where a text has many partners.
    """

    before: list[int]
    between: list[int]
    behind: list[int]
    types: tuple[list[int], int, list[int], int, list[int]]
    """Types of: special tokens before, the first text, between, the second text, behind."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
        """Read from a pair of texts. :param tokenizer: a fast one."""
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
        """Token ids of a pair."""
        return [*self.before, *first, *self.between, *second, *self.behind]

    def join_types(self, first: int, second: int) -> list[int]:
        """Token types of a pair. :param first: tokens of the first text; and `second` those of the other."""
        before, one, between, other, behind = self.types
        return [*before, *[one] * first, *between, *[other] * second, *behind]


def pair_up(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], partners: list[list[str]], max_length: int | None
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Tokens of each text with each of its partners; the text is cut where a pair has more than max_length.

    :returns: `input_ids` and, where the model takes them, `token_type_ids` of each pair; whether each was cut.
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
    """Tokens that are left. :raises ValueError: when none of several would be."""
    if len(tokens) > room <= 0:
        raise ValueError("the second text of a pair leaves no room for the first; raise batch.max_length")
    return tokens[:room] if side == "right" else tokens[max(len(tokens) - room, 0) :]


def _pair_up_again(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], partners: list[list[str]], max_length: int | None
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Tokenisers with Python code of their own read both texts of every pair."""
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
