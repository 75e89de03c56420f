"""Training text2text-generation: texts and their target texts, such as a correction or an answer."""

from __future__ import annotations

from hfbatch.train.metrics.generation import chrf, error_rates, exact_match
from hfbatch.train.recipes.seq2seq import Seq2SeqRecipe


class Text2TextGenerationRecipe(Seq2SeqRecipe):
    """Trains generation of a text from a text. The baseline is the input text."""

    name = "text2text-generation"
    written = ("chrf", "exact_match", "wer", "cer")

    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Computes exact match, chrF, word error rate and character error rate."""
        return {**exact_match(texts, targets), **chrf(texts, targets), **error_rates(texts, targets)}
