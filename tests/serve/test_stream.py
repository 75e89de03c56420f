"""The pieces of a text that is sent while it is generated make up the text of the whole answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.serve.stream import TextStream, cut_at
from tests.models.text import bytes_tokenizer

TOKENIZERS = {cleaned: bytes_tokenizer(128) for cleaned in (False, True)}
for cleaned, tokenizer in TOKENIZERS.items():
    tokenizer.clean_up_tokenization_spaces = cleaned
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = cleaned
PARTS = st.sampled_from([*"ab .,!?'", " n't", " 's", "é", "☃", "stop", "st"])


@pytest.mark.parametrize("cleaned", [False, True])
@given(parts=st.lists(PARTS, max_size=12), stops=st.lists(st.sampled_from(["stop", " .", "b"]), max_size=2))
def test_the_pieces_make_up_the_whole_text(cleaned: bool, parts: list[str], stops: list[str]) -> None:
    tokenizer = TOKENIZERS[cleaned]
    task = SimpleNamespace(tokenizer=tokenizer, decoding=SimpleNamespace(eos_token_id=-1))
    tokens = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    whole = cut_at(tokenizer.decode(tokens, skip_special_tokens=True), stops)
    stream = TextStream(task, stops)
    pieces = [stream.add(token) for token in tokens]
    assert "".join([*pieces, stream.rest(whole)]) == whole


def test_a_space_that_decoding_removes_is_not_sent() -> None:
    tokenizer = TOKENIZERS[True]
    tokens = tokenizer("It is fine .", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == "It is fine."
