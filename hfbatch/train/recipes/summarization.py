"""Training summarization: texts and their summaries."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from hfbatch.tasks import base
from hfbatch.train.metrics.generation import rouge
from hfbatch.train.recipes.seq2seq import Seq2SeqRecipe, Seq2SeqTraining


class SummarizationTraining(Seq2SeqTraining):
    """Params of summarization training."""

    rouge_words: Literal["english", "any"] = "english"
    """What ROUGE compares. english: stems of words of a-z, as published figures do; any: whole words of any script."""


class SummarizationRecipe(Seq2SeqRecipe):
    """Trains summarization. The baseline is the first sentence of a text."""

    name = "summarization"
    Params: ClassVar[type[base.Params]] = SummarizationTraining
    written = ("rougeL", "rouge1", "rouge2")
    params: SummarizationTraining

    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Computes ROUGE-1, ROUGE-2 and ROUGE-L."""
        return rouge(texts, targets, self.params.rouge_words == "english")

    def guess(self, text: str) -> str:
        """Returns the first sentence."""
        return re.split(r"(?<=[.!?])\s|(?<=[。！？])", text.strip(), maxsplit=1)[0]
