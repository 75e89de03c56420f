"""Utilities of text tasks: tokens as flat arrays, padded without a Python loop over rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Batch, Features, InputColumn
from hfbatch.tasks.positions import embedding_rows, has_embedding, model_padding, position_limit

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_words(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of strings."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type)


def text_column(name: str, required: bool = True) -> InputColumn:
    """Returns an input column of strings. Of a task's, `params.template` may render the first."""
    return InputColumn(name, is_text, "string", required, rendered_by="template")


def length_limit(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """Returns the model's maximum length: the minimum of the tokenizer's limit and the number of positions.

    Tokenizers without a limit have a `model_max_length` of 1e30.
    """
    limits = [tokenizer.model_max_length, position_limit(config)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1e9]
    return min(known, default=None)


def length_faults(
    max_length: int | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    name: str = "batch.max_length",
) -> list[str]:
    """Returns an error if a length limit exceeds the model's or leaves no room for text; none for None.

    :param name: name of the limit in the spec.
    """
    if max_length is None:
        return []
    limit, special = length_limit(tokenizer, config), tokenizer.num_special_tokens_to_add()
    if limit is not None and max_length > limit:
        return [f"{name} {max_length} is more than the model's {limit} tokens; set at most {limit}"]
    if max_length <= special:
        return [f"{name} {max_length} leaves no room beside {special} special tokens; set more"]
    return []


def padding_id(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, vocabulary: int | None = None
) -> int:
    """Returns the padding id: the model's, else the tokenizer's, else the eos token's, else 0 or 1.

    Only ids with an embedding qualify; the attention mask hides the token itself. The model's id comes first
    because models such as RoBERTa and causal classifiers search for it. Encoder-decoders classify a row by its
    last eos token, so they are not padded with it.

    :param vocabulary: see `Task.vocabulary`.
    """
    known = [model_padding(config, vocabulary), tokenizer.pad_token_id, tokenizer.eos_token_id, 0, 1]
    encodes = getattr(config, "is_encoder_decoder", False)
    ends = (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)) if encodes else ()
    rows = embedding_rows(config, vocabulary)
    return next(int(number) for number in known if number not in ends and has_embedding(number, rows))


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None = None,
    max_length: int | None = None,
    add_special_tokens: bool = True,
    return_token_type_ids: bool = True,
) -> Features:
    """Returns token ids of each text as list<int32>, truncated to max_length tokens, special tokens included.

    An empty second text counts as none, as when transformers encodes a single row.

    :param return_token_type_ids: also return `token_type_ids`, if the model takes them.
    """
    encode = _encode_fast if is_plain(tokenizer) else _encode
    columns, cut = encode(tokenizer, texts, pairs, max_length, add_special_tokens)
    if not return_token_type_ids:
        columns.pop("token_type_ids", None)
    table = pa.table({name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()})
    return Features(table, cut)


def require_tokens(features: Features) -> Features:
    """Returns the features unchanged. :raises ValueError: if a row has no tokens, which no encoder accepts."""
    if len(features.table) and list_lengths(features.table["input_ids"]).min() == 0:
        raise ValueError("the text gives no token with this tokenizer; filter empty texts out")
    return features


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether encoding is done by the Rust tokenizer only."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    base = TokenizersBackend
    return tokenizer.is_fast and kind._encode_plus is base._encode_plus and kind.__call__ is base.__call__


def _encode_fast(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int | None,
    add_special_tokens: bool,
) -> tuple[dict[str, Any], np.ndarray]:
    """Calls the Rust tokenizer directly: twice as fast as through transformers, which copies each row."""
    rust = tokenizer.backend_tokenizer
    rust.no_padding()
    rust.encode_special_tokens = tokenizer.split_special_tokens
    if max_length is None:
        rust.no_truncation()
    else:
        rust.enable_truncation(max_length, direction=tokenizer.truncation_side)
    inputs = texts if pairs is None else [(a, b) if b else a for a, b in zip(texts, pairs, strict=True)]
    rows = rust.encode_batch_fast(inputs, add_special_tokens=add_special_tokens)
    columns = {"input_ids": [row.ids for row in rows]}
    if "token_type_ids" in tokenizer.model_input_names:
        columns["token_type_ids"] = [row.type_ids for row in rows]
    return columns, np.array([bool(row.overflowing) for row in rows], bool)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int | None,
    add_special_tokens: bool,
) -> tuple[dict[str, Any], np.ndarray]:
    """Encodes with a Python tokenizer; encodes rows of max_length again without truncation to find truncated ones."""
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    if not texts:
        return {"input_ids": []}, np.zeros(0, bool)
    encoded = tokenizer(texts, pairs, truncation=max_length is not None, max_length=max_length, **options)
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    full = [row for row, ids in enumerate(columns["input_ids"]) if len(ids) == max_length]
    cut = np.zeros(len(texts), bool)
    if full:
        again = tokenizer([texts[row] for row in full], pairs and [pairs[row] for row in full], **options)
        cut[full] = [len(ids) > int(max_length or 0) for ids in again["input_ids"]]
    return columns, cut


def list_lengths(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns the number of items in each list, int64 [rows]."""
    return np.diff(offsets_of(flatten(column)))


def token_counts(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns the number of items in each list, or in each list of lists, int64 [rows]."""
    lists = flatten(column)
    if not pa.types.is_list(lists.type.value_type):
        return list_lengths(lists)
    ends = np.concatenate([[0], np.cumsum(list_lengths(lists.flatten()))])
    return np.diff(ends[np.concatenate([[0], np.cumsum(list_lengths(lists))])])


def lists_of(values: pa.Array, counts: Sequence[int] | np.ndarray) -> pa.ListArray:
    """Groups values into lists, one per row. :param counts: number of values in each row."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), values)


def insert_behind_first(lists: pa.ListArray, value: int) -> pa.ListArray:
    """Inserts a value behind the first one of each list, or into an empty list."""
    counts = list_lengths(lists)
    places = np.cumsum(counts) - counts + np.minimum(counts, 1)
    values = np.insert(lists.flatten().to_numpy(), places, value)
    return lists_of(pa.array(values, pa.int32()), counts + 1)


def lengthen(lists: pa.ListArray, missing: np.ndarray, value: int) -> pa.ListArray:
    """Appends a value to each list. :param missing: how often, int64 [rows]."""
    counts = list_lengths(lists)
    values = np.insert(lists.flatten().to_numpy(), np.repeat(np.cumsum(counts), missing), value)
    return lists_of(pa.array(values, pa.int32()), counts + missing)


def flatten(column: pa.ChunkedArray | pa.Array) -> pa.ListArray:
    """Returns a column, of lists or of single values, as one array, without a copy if it has one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def offsets_of(lists: pa.ListArray) -> np.ndarray:
    """Returns the start of each list in `lists.values`, int64 [rows + 1]."""
    return lists.offsets.to_numpy().astype(np.int64)


def pad(
    column: pa.ChunkedArray | pa.Array,
    rows: np.ndarray,
    fill: int,
    multiple: int = 1,
    left: bool = False,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gathers ragged rows into a padded array.

    :param rows: positions in column, int64 [batch].
    :param multiple: the width is rounded up to a multiple of this, but not beyond limit.
    :param left: pad on the left, as needed for generation with decoders.
    :returns: ids and attention mask, both int64 [batch, width].
    """
    lists = flatten(column)
    offsets = offsets_of(lists)
    values = lists.values.to_numpy()
    lengths = offsets[rows + 1] - offsets[rows]
    longest = int(lengths.max(initial=0))
    width = max(-(-longest // multiple) * multiple, 1)
    if limit is not None:
        width = max(min(width, limit), longest)
    column_of = np.arange(width)[None, :]
    shift = (width - lengths)[:, None] if left else 0
    position = column_of - shift
    mask = (position >= 0) & (position < lengths[:, None])
    if not len(values):
        return np.full(mask.shape, fill, np.int64), mask.astype(np.int64)
    source = np.where(mask, offsets[rows][:, None] + position, 0)
    return np.where(mask, values[source], fill).astype(np.int64), mask.astype(np.int64)


def collate_text(
    features: pa.Table,
    rows: np.ndarray,
    pad_id: int,
    multiple: int = 1,
    left: bool = False,
    limit: int | None = None,
    full_mask: bool = True,
) -> Batch:
    """Returns padded `input_ids`, `attention_mask` and, if present, `token_type_ids`: int64 [batch, width].

    :param full_mask: return a mask even if no row is padded. Without a mask, attention takes its fastest path.
    """
    ids, mask = pad(features["input_ids"], rows, pad_id, multiple, left, limit)
    batch = {"input_ids": ids}
    if full_mask or not mask.all():
        batch["attention_mask"] = mask
    if "token_type_ids" in features.column_names:
        batch["token_type_ids"], _ = pad(features["token_type_ids"], rows, 0, multiple, left, limit)
    return batch


def run_text(model: Any, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """Calls an encoder model with the inputs that it accepts, without a key-value cache.

    :param options: further arguments of the model.
    """
    known = inspect.signature(model.forward).parameters
    takes_all = "input_ids" not in known
    inputs = {
        name: tensor
        for name, tensor in batch.items()
        if takes_all or name in known or name == "attention_mask"
    }
    return model(**inputs, **options, **({"use_cache": False} if "use_cache" in known else {}))


def compact(kept: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Moves what is kept of each row to its start, in order, so that only that is copied from the device.

    :param kept: bool [batch, width].
    :param tensors: [batch, width, ...].
    :returns: the number of kept places, int32 [batch], and each tensor as [batch, largest number, ...], zeros behind them.
    """
    import torch

    rows, columns = kept.nonzero(as_tuple=True)
    count = kept.sum(1)
    places = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    found = [count.to(torch.int32)]
    for tensor in tensors:
        moved = tensor.new_zeros(len(kept), int(count.max()), *tensor.shape[2:])
        moved[rows, places] = tensor[rows, columns]
        found.append(moved)
    return tuple(found)
