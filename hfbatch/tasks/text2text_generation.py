"""Task text2text-generation: what an encoder-decoder model writes for a text. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hfbatch.tasks.base import Example
from hfbatch.tasks.parts.generating import EXTRA_OUTPUTS
from hfbatch.tasks.parts.seq2seq import Seq2SeqTask


class Text2TextGeneration(Seq2SeqTask):
    """What an encoder-decoder model writes for each text."""

    name = "text2text-generation"
    summary = "What an encoder-decoder model such as T5 or BART writes for a text"
    outputs: ClassVar[Mapping[str, str]] = {"generated_text": "string", **EXTRA_OUTPUTS}
    EXAMPLE = Example({"text": ["Is the sky blue?", "What is two and two?"]}, {"max_new_tokens": 20})
