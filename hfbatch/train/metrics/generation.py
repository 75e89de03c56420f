"""Metrics of generated texts against one reference each, by rouge_score, sacrebleu and jiwer."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(texts: list[str], references: list[str], english: bool = True) -> dict[str, float]:
    """Computes ROUGE-1, ROUGE-2 and ROUGE-L: F-measures from 0 to 1, averaged over rows.

    :param english: compare stems of words of a-z and 0-9, as published figures do; else whole words of any script.
    :returns: rouge1, rouge2, rougeL.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(ROUGE, use_stemmer=True, tokenizer=None if english else AnyWords())
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in ROUGE}


class AnyWords:
    """Splits texts of any script into words for rouge_score, whose default tokenizer keeps only a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words in lower case."""
        return re.findall(r"\w+", text.lower())


def bleu(texts: list[str], references: list[str], tokenizer: str = "13a") -> dict[str, float]:
    """Computes sacreBLEU over all rows, from 0 to 100.

    :param tokenizer: tokenizer of sacrebleu: 13a, intl, zh, char or none.
    :returns: bleu.
    """
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(texts, [references], tokenize=tokenizer).score)}


def chrf(texts: list[str], references: list[str]) -> dict[str, float]:
    """Computes chrF2 (character n-grams) over all rows, from 0 to 100. :returns: chrf."""
    from sacrebleu import corpus_chrf

    return {"chrf": float(corpus_chrf(texts, [references]).score)}


def error_rates(texts: list[str], references: list[str]) -> dict[str, float]:
    """Computes word and character error rates; 0 is best, values above 1 are possible.

    :param references: must not be blank.
    :returns: wer and cer, over all rows together.
    """
    import jiwer

    known: dict[str, Any] = {"reference": references, "hypothesis": texts}
    return {"wer": float(jiwer.wer(**known)), "cer": float(jiwer.cer(**known))}


def exact_match(texts: list[str], references: list[str]) -> dict[str, float]:
    """Computes the share of texts equal to their reference, without surrounding space. :returns: exact_match."""
    same = [text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)]
    return {"exact_match": float(np.mean(same))}


def perplexity(loss: float, tokens: int) -> dict[str, float]:
    """Computes the perplexity, the exponential of the mean loss per token.

    :param loss: cross-entropy in nats, summed over tokens, so that long rows count more than short ones.
    :returns: perplexity, at least 1; infinite beyond the largest float.
    """
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(np.float64(loss) / tokens))}
