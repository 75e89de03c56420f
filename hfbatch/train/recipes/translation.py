"""Training translation: texts and what they are in another language."""

from __future__ import annotations

from typing import ClassVar, Literal

from hfbatch.tasks import base
from hfbatch.train.metrics.generation import bleu, chrf
from hfbatch.train.recipes.parts.seq2seq import Seq2SeqRecipe, Seq2SeqTraining


class TranslationTraining(Seq2SeqTraining):
    """Which languages are learnt, and how translations are measured."""

    src_lang: str | None = None
    """Language of the texts, as the model's tokenizer names it, for models of many languages."""
    tgt_lang: str | None = None
    """Language of the targets, as the model's tokenizer names it."""
    bleu_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """How sacreBLEU cuts words; zh for Chinese, char for languages that are written without spaces."""


class TranslationRecipe(Seq2SeqRecipe):
    """Learns translations; the guess without a model is the text as it is."""

    name = "translation"
    Params: ClassVar[type[base.Params]] = TranslationTraining
    written = ("bleu", "chrf")
    params: TranslationTraining

    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """sacreBLEU and chrF."""
        return {**bleu(texts, targets, self.params.bleu_tokenizer), **chrf(texts, targets)}
