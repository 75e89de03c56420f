"""Checks that a tokenizer's vocabulary file exists: without it, transformers uses special tokens only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY = re.compile(
    r"(tokenizer(\.[0-9.]+)?|vocab.*|tekken)\.json|vocab.*\.txt|.*\.(model|spm|tiktoken|vocab)"
)
"""Names of vocabulary files."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Compares a loaded tokenizer with its files; tokenizers defined by code only need none.

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
