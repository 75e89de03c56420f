"""The vocabulary of a tokenizer: the changes of a spec, tokens without an embedding, and the file that must exist, without
which transformers uses special tokens only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfbatch.spec.job import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY = re.compile(
    r"(tokenizer(\.[0-9.]+)?|vocab.*|tekken)\.json|vocab.*\.txt|.*\.(model|spm|tiktoken|vocab)"
)
"""Names of vocabulary files."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Compares a loaded tokenizer with its files: without a vocabulary, transformers uses special tokens only. Tokenizers defined by code only need none.

    :raises ValueError: if no file holds a vocabulary, so that every token would be unknown.
    """
    own = {name for kind, name in type(tokenizer).vocab_files_names.items() if kind != "merges_file"}
    names = {path.name for path in Path(folder).iterdir()}
    if own and not own & names and not any(map(_VOCABULARY.fullmatch, names)):
        raise ValueError(
            f"its folder has no vocabulary for {type(tokenizer).__name__} ({' or '.join(sorted(own))} is missing), so that "
            "every text would be read as unknown tokens; save the tokenizer there with save_pretrained, or download the "
            "model again"
        )


def change_tokenizer(tokenizer: PreTrainedTokenizerBase, changes: TokenizerSpec) -> None:
    """Applies changes to a tokenizer; existing tokens keep their ids."""
    if changes.special_tokens:
        tokenizer.add_special_tokens(dict(changes.special_tokens))
    tokenizer.add_tokens(list(changes.add_special_tokens), special_tokens=True)
    tokenizer.add_tokens(list(changes.add_tokens))
    tokenizer.truncation_side = changes.truncation_side or tokenizer.truncation_side
    tokenizer.padding_side = changes.padding_side or tokenizer.padding_side


def no_embedding(token: int, names: Mapping[int, str], embedded: int | None) -> str:
    """Returns the reject message for a row with a token that has no embedding.

    :param names: tokens without an embedding, by id.
    :param embedded: number of token ids with an embedding.
    """
    return (
        f"token {names.get(token)!r} has id {token}, and the model has embeddings for only {embedded} tokens"
    )
