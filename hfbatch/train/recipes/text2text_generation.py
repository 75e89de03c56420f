"""Training text2text-generation: texts and what is to be written for them, such as a correction or an answer."""

from __future__ import annotations

from hfbatch.train.metrics.generation import chrf, error_rates, exact_match
from hfbatch.train.recipes.parts.seq2seq import Seq2SeqRecipe


class Text2TextGenerationRecipe(Seq2SeqRecipe):
    """Learns any text for a text; the guess without a model is the text as it is."""

    name = "text2text-generation"
    written = ("chrf", "exact_match", "wer", "cer")

    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Exact match, chrF, and errors by words and by characters."""
        return {**exact_match(texts, targets), **chrf(texts, targets), **error_rates(texts, targets)}
