"""Task summarization: a summary of a text. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hfbatch.tasks.base import Example
from hfbatch.tasks.parts.generating import EXTRA_OUTPUTS
from hfbatch.tasks.parts.seq2seq import Seq2SeqTask


class Summarization(Seq2SeqTask):
    """A summary of each text."""

    name = "summarization"
    general = False
    summary = "A summary of a text, by an encoder-decoder model"
    outputs: ClassVar[Mapping[str, str]] = {"summary_text": "string", **EXTRA_OUTPUTS}
    EXAMPLE = Example({"text": ["A long report about the weather of the north."]}, {"max_new_tokens": 40})
