"""Whether a tokenizer has a vocabulary of its own: without its file, transformers makes one of special tokens alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARY = re.compile(
    r"(tokenizer(\.[0-9.]+)?|vocab.*|tekken)\.json|vocab.*\.txt|.*\.(model|spm|tiktoken|vocab)"
)
"""Names of files that hold one."""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Compares a tokenizer, as loaded, with the files that it is from; those made of code alone have none.

    :raises ValueError: when no file has a vocabulary, so that each text would become unknown tokens.
    """
    own = {name for kind, name in type(tokenizer).vocab_files_names.items() if kind != "merges_file"}
    names = {path.name for path in Path(folder).iterdir()}
    if own and not own & names and not any(map(_VOCABULARY.fullmatch, names)):
        raise ValueError(
            f"its folder has no vocabulary for {type(tokenizer).__name__} ({' or '.join(sorted(own))} is missing), so that "
            "every text would be read as unknown tokens; save the tokenizer there with save_pretrained, or download the "
            "model again"
        )
