"""Training translation: texts and their translations."""

from __future__ import annotations

from typing import ClassVar, Literal

from hfbatch.tasks import base
from hfbatch.train.metrics.generation import bleu, chrf
from hfbatch.train.recipes.seq2seq import Seq2SeqRecipe, Seq2SeqTraining


class TranslationTraining(Seq2SeqTraining):
    """Languages, and options of the metrics."""

    src_lang: str | None = None
    """Language of the texts, as the model's tokenizer names it; for multilingual models."""
    tgt_lang: str | None = None
    """Language of the targets, as the model's tokenizer names it."""
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """Tokenizer of sacreBLEU; zh for Chinese, char for languages that are written without spaces."""


class TranslationRecipe(Seq2SeqRecipe):
    """Trains translation. The baseline is the untranslated text."""

    name = "translation"
    Params: ClassVar[type[base.Params]] = TranslationTraining
    written = ("bleu", "chrf")
    params: TranslationTraining

    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Computes sacreBLEU and chrF."""
        return {**bleu(texts, targets, self.params.bleu_tokenizer), **chrf(texts, targets)}
