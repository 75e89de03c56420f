"""Task text2text-generation: generates text with an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hfbatch.tasks.base import Example
from hfbatch.tasks.generation.seq2seq import Seq2SeqTask
from hfbatch.tasks.generation.text_generation_base import EXTRA_OUTPUTS


class Text2TextGeneration(Seq2SeqTask):
    """Generates a text for each text with an encoder-decoder model."""

    name = "text2text-generation"
    summary = "Text generated from a text, by an encoder-decoder model such as T5 or BART"
    outputs: ClassVar[Mapping[str, str]] = {"generated_text": "string", **EXTRA_OUTPUTS}
    EXAMPLE = Example({"text": ["Is the sky blue?", "What is two and two?"]}, {"max_new_tokens": 20})
