"""Cuts long texts into windows of tokens that may overlap, and pools the vectors of a text's windows.

For the batching of windows, see hfbatch.runtime.windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Params
from hfbatch.tasks.text.windows import TOKENS
from hfbatch.tasks.tokens import flatten, list_lengths, lists_of, offsets_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHT, START, END = "window_tokens", "window_start", "window_end"
"""Features with a value for each window: its tokens of the text, and its first and last character in the text."""


class WindowParams(Params):
    """Windows over texts that are longer than one."""

    size: int | None = Field(default=None, ge=1)
    """Tokens of a window, including special tokens and the prompt; default: the maximum length of a row."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of one window to the start of the next; default: all tokens of the text that a window holds, so
    that windows do not overlap."""
    pool: Literal["mean", "max", "none"] = "mean"
    """mean: the mean of the vectors, weighted by the tokens of the text in each window; max: the maximum in each dimension;
    none: a list with the vector of each window, and a column `spans` with its characters."""


@dataclass(frozen=True)
class Frame:
    """The size of windows, and what each has beside its part of the text."""

    size: int
    before: int
    """Tokens before the text: special tokens and the prompt."""
    behind: int
    """Special tokens behind the text."""
    stride: int | None = None
    """Tokens of the text from one window to the next; None for `room`."""

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.size - self.before - self.behind

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, prompt: str, size: int, stride: int | None = None
    ) -> Frame:
        """Counts the tokens around a text, of which each window gets its own."""
        # Many tokenizers join a space to the token after it, which belongs to the text.
        bare, given = (
            row.as_py()
            for row in tokenize(tokenizer, ["a", prompt.rstrip()], add_special_tokens=False).table[
                "input_ids"
            ]
        )
        whole = tokenize(tokenizer, ["a"]).table["input_ids"][0].as_py()
        special = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        return cls(size, special + len(given), len(whole) - len(bare) - special, stride)

    def faults(self) -> list[str]:
        """Returns an error if text would be left out."""
        beside = f"{self.before + self.behind} special tokens and tokens of the prompt"
        if self.room < 1:
            return [f"params.windows.size {self.size} leaves no room for text beside {beside}; set more"]
        if self.stride and self.stride > self.room:
            return [
                f"params.windows.stride {self.stride} skips text: a window of {self.size} tokens holds {self.room} of the text "
                f"beside {beside}; set at most {self.room}"
            ]
        return []


def with_characters(tokenizer: PreTrainedTokenizerBase, texts: list[str], skip: int) -> pa.Table:
    """Returns all tokens of texts, special tokens included, with `start` and `end` of each in characters: list<int32>.

    :param tokenizer: a fast one, which returns offsets.
    :param skip: characters of the prompt, which are not counted.
    """
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    columns = {name: pa.array(encoded[name], pa.list_(pa.int32())) for name in TOKENS if name in encoded}
    places = np.array(list(chain.from_iterable(encoded["offset_mapping"])), np.int32).reshape(-1, 2)
    sizes = [len(row) for row in encoded["input_ids"]]
    for name, values in zip(("start", "end"), np.maximum(places - skip, 0).T, strict=True):
        columns[name] = lists_of(pa.array(values), sizes)
    return pa.table(columns)


def slide(tokens: pa.Table, frame: Frame) -> pa.Table:
    """Cuts each text into as many windows as it needs; a text that fits into one stays as it is.

    :param tokens: all tokens of each text as list<int32>, and `start` and `end` of each if spans are wanted.
    :returns: tokens of each window as list<list<int32>>; WEIGHT, START and END of each window as list<int32>.
    """
    lists = {name: flatten(tokens[name]) for name in tokens.column_names}
    begin, lengths = offsets_of(lists["input_ids"])[:-1], list_lengths(lists["input_ids"])
    text, stride = np.maximum(lengths - frame.before - frame.behind, 0), frame.stride or frame.room
    counts = 1 + np.maximum(-(-(text - frame.room) // stride), 0)
    row = np.repeat(np.arange(len(counts)), counts)
    first = _places(counts) * stride
    taken = np.minimum(text[row] - first, frame.room)
    sizes = np.where(counts[row] == 1, lengths[row], frame.before + taken + frame.behind)
    place, of = _places(sizes), np.repeat(np.arange(len(sizes)), sizes)
    inside = place < (frame.before + taken)[of]
    shift = np.where(place < frame.before, 0, np.where(inside, first[of], (lengths[row] - sizes)[of]))
    source = begin[row][of] + place + shift

    def pick(name: str, index: np.ndarray) -> pa.Array:
        """Returns values of tokens."""
        return pa.array(lists[name].values.to_numpy()[index], pa.int32())

    columns = {
        name: lists_of(lists_of(pick(name, source), sizes), counts) for name in TOKENS if name in lists
    }
    columns[WEIGHT] = lists_of(pa.array(taken, pa.int32()), counts)
    if "start" in lists:
        start = np.minimum(begin[row] + frame.before + first, (begin + lengths)[row] - 1)
        stop = np.where(taken > 0, start + taken - 1, start)
        columns[START] = lists_of(pick("start", start), counts)
        columns[END] = lists_of(pick("end", stop), counts)
    return pa.table(columns)


def _places(counts: np.ndarray) -> np.ndarray:
    """Returns the positions of items in their groups. :param counts: items of each group."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def pool_windows(
    vectors: np.ndarray, counts: np.ndarray, weights: np.ndarray, pool: str, unit: bool
) -> np.ndarray:
    """Pools the vectors of windows into one per text; the vector of a text's only window stays as it is.

    The mean is weighted by tokens, so that a short last window counts for less, and is then scaled to length 1. Source:
    "Embedding texts that are longer than the model's maximum context length" in the OpenAI Cookbook. For vectors that are not
    normalized, it is the mean over the tokens of all windows where the vector of a window is the mean of its tokens.

    :param vectors: float32 [windows, dimension].
    :param counts: windows of each text, at least 1.
    :param weights: tokens of each window.
    :param pool: mean or max.
    :param unit: whether pooled vectors get length 1.
    """
    starts = np.cumsum(counts) - counts
    if pool == "max":
        pooled = np.maximum.reduceat(vectors, starts)
    else:
        weight = weights.astype(np.float32)[:, None]
        pooled = np.add.reduceat(vectors * weight, starts) / np.maximum(np.add.reduceat(weight, starts), 1)
    if unit:
        pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    single = counts == 1
    pooled[single] = vectors[starts[single]]
    return pooled
