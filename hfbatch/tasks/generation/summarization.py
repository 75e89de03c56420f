"""Task summarization: summarizes a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hfbatch.tasks.base import Example
from hfbatch.tasks.generation.seq2seq import Seq2SeqTask
from hfbatch.tasks.generation.text_generation_base import EXTRA_OUTPUTS


class Summarization(Seq2SeqTask):
    """Summarizes each text."""

    name = "summarization"
    general = False
    summary = "A summary of a text, by an encoder-decoder model"
    outputs: ClassVar[Mapping[str, str]] = {"summary_text": "string", **EXTRA_OUTPUTS}
    EXAMPLE = Example({"text": ["A long report about the weather of the north."]}, {"max_new_tokens": 40})
