"""Tokens and padding: what text tasks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from hfbatch.tasks.tokens import (
    collate_text,
    is_text,
    length_faults,
    length_limit,
    list_lengths,
    pad,
    padding_id,
    require_tokens,
    tokenize,
)
from tests.models.text import CORPUS, bytes_tokenizer, tiny_bert_encoder, tiny_llama, wordpiece_tokenizer

TEXTS = [*CORPUS[:6], "", " ", "word " * 300, "Ünïcode 漢字 🙂 <s> [SEP]"]
PAIRS = [*CORPUS[6:12], "second", "", "short", "other " * 200]
RAGGED = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=8)


@settings(deadline=None)
@given(data=st.data(), lists=RAGGED, multiple=st.integers(1, 8), left=st.booleans(), sliced=st.booleans())
def test_pad_equals_a_plain_loop(
    data: st.DataObject, lists: list[list[int]], multiple: int, left: bool, sliced: bool
) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=6)))
    limit = data.draw(st.none() | st.integers(9, 12))
    column = pa.array([[7], *lists] if sliced else lists, pa.list_(pa.int32()))[1 if sliced else 0 :]
    ids, mask = pad(pa.chunked_array([column]), rows, -1, multiple, left, limit)
    width = max(1, -(-max(len(lists[row]) for row in rows) // multiple) * multiple)
    width = width if limit is None else min(width, limit)
    for row, got, real in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        padding = width - len(lists[row])
        filler, ones = [-1] * padding, [1] * len(lists[row])
        assert got == (filler + lists[row] if left else lists[row] + filler)
        assert real == ([0] * padding + ones if left else ones + [0] * padding)


@pytest.mark.parametrize("max_length", [None, 8, 20])
@pytest.mark.parametrize("pairs", [None, PAIRS])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("build", [wordpiece_tokenizer, bytes_tokenizer])
def test_tokens_equal_what_the_tokenizer_itself_gives(
    build: type[PreTrainedTokenizerBase], special: bool, pairs: list[str] | None, max_length: int | None
) -> None:
    tokenizer = build()
    features = tokenize(tokenizer, TEXTS, pairs, max_length, add_special_tokens=special)
    options = {"add_special_tokens": special, "verbose": False}
    rows = [(text, None) for text in TEXTS] if pairs is None else list(zip(TEXTS, pairs, strict=True))
    limits = {"truncation": max_length is not None, "max_length": max_length}
    expected = [tokenizer(text, pair, **limits, **options) for text, pair in rows]
    whole = [tokenizer(text, pair, **options)["input_ids"] for text, pair in rows]
    for name in features.table.column_names:
        assert features.table[name].to_pylist() == [row[name] for row in expected]
    assert ("token_type_ids" in features.table.column_names) == ("token_type_ids" in expected[0])
    cut = [len(ids) > (max_length or len(ids)) for ids in whole]
    assert features.cut.tolist() == cut
    assert features.truncated == sum(cut)


def test_a_tokenizer_in_python_gives_the_same_tokens_and_counts_cut_rows() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    texts = ["four", "seven 7", "eight 88", ""]
    features = tokenize(tokenizer, texts, max_length=8)
    assert (
        features.table["input_ids"].to_pylist()
        == tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    )
    assert features.truncated == 1
    pairs = tokenize(tokenizer, texts, ["x", "y", "z", "w" * 9], max_length=8)
    assert pairs.cut.tolist() == [False, True, True, True]
    assert tokenize(tokenizer, []).table.num_rows == 0


def test_truncation_follows_the_side_that_the_tokenizer_names() -> None:
    tokenizer = bytes_tokenizer(truncation_side="left")
    ids = tokenize(tokenizer, ["abcdefgh"], max_length=4).table["input_ids"].to_pylist()
    assert ids == tokenizer(["abcdefgh"], truncation=True, max_length=4)["input_ids"]


def test_no_rows_give_an_empty_table() -> None:
    features = tokenize(wordpiece_tokenizer(), [], max_length=8)
    assert features.table.num_rows == 0
    assert features.table.schema.field("input_ids").type == pa.list_(pa.int32())


def test_a_row_without_tokens_is_an_error() -> None:
    features = tokenize(bytes_tokenizer(), ["", "a"], add_special_tokens=False)
    with pytest.raises(ValueError, match="no token"):
        require_tokens(features)
    assert require_tokens(tokenize(bytes_tokenizer(), [""])).table.num_rows == 1


def test_the_mask_can_be_left_out_only_where_no_row_is_padded() -> None:
    features = tokenize(wordpiece_tokenizer(), ["a b", "c d", "a b c"]).table
    assert "attention_mask" not in collate_text(features, np.array([0, 1]), 0, full_mask=False)
    assert "attention_mask" in collate_text(features, np.array([0, 2]), 0, full_mask=False)
    assert "attention_mask" in collate_text(features, np.array([0, 1]), 0, multiple=8, full_mask=False)
    assert collate_text(features, np.array([0, 1]), 0)["attention_mask"].all()


def test_lengths_and_the_models_limit(tmp_path: Path) -> None:
    folder = tiny_bert_encoder(tmp_path, max_position_embeddings=48)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert length_limit(tokenizer, config) == 48
    tokenizer.model_max_length = 32
    assert length_limit(tokenizer, config) == 32
    assert length_faults(32, tokenizer, config) == length_faults(None, tokenizer, config) == []
    assert length_faults(33, tokenizer, config) == [
        "batch.max_length 33 is more than the model's 32 tokens; set at most 32"
    ]
    assert "leaves no room" in length_faults(2, tokenizer, config)[0]
    assert list_lengths(tokenize(tokenizer, ["a b", ""]).table["input_ids"]).tolist() == [4, 2]


def test_the_padding_id_is_the_models_then_the_tokenizers_then_the_end_of_text(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama(tmp_path))
    assert padding_id(bytes_tokenizer(), config) == 2
    assert padding_id(bytes_tokenizer(pad_token="<pad>"), config) == 0
    config.pad_token_id = 5
    assert padding_id(bytes_tokenizer(pad_token="<pad>"), config) == 5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.string(), True),
        (pa.large_string(), True),
        (pa.string_view(), True),
        (pa.dictionary(pa.int32(), pa.string()), True),
        (pa.binary(), False),
        (pa.int64(), False),
        (pa.list_(pa.string()), False),
    ],
)
def test_columns_of_any_string_type_are_text(kind: pa.DataType, expected: bool) -> None:
    assert is_text(kind) == expected
