"""Metrics of written texts against one reference each, by rouge_score, sacrebleu and jiwer."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(texts: list[str], references: list[str], english: bool = True) -> dict[str, float]:
    """Shared words, shared pairs of words and longest common subsequence, F-measures from 0 to 1, means over rows.

    :param english: compare stems of words of a-z and 0-9, as published figures do; else whole words of any script.
    :returns: rouge1, rouge2, rougeL.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(ROUGE, use_stemmer=True, tokenizer=None if english else AnyWords())
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in ROUGE}


class AnyWords:
    """Cuts texts of any script into words for rouge_score, whose own tokens are a-z and 0-9 alone."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case."""
        return re.findall(r"\w+", text.lower())


def bleu(texts: list[str], references: list[str], tokenizer: str = "13a") -> dict[str, float]:
    """sacreBLEU of all rows together, from 0 to 100.

    :param tokenizer: of sacrebleu: 13a, intl, zh, char or none.
    :returns: bleu.
    """
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(texts, [references], tokenize=tokenizer).score)}


def chrf(texts: list[str], references: list[str]) -> dict[str, float]:
    """chrF2, shared runs of characters of all rows together, from 0 to 100. :returns: chrf."""
    from sacrebleu import corpus_chrf

    return {"chrf": float(corpus_chrf(texts, [references]).score)}


def error_rates(texts: list[str], references: list[str]) -> dict[str, float]:
    """Words and characters to change for one of the references; 0 is best, above 1 is possible.

    :param references: none of them blank.
    :returns: wer and cer, over all rows together.
    """
    import jiwer

    known: dict[str, Any] = {"reference": references, "hypothesis": texts}
    return {"wer": float(jiwer.wer(**known)), "cer": float(jiwer.cer(**known))}


def exact_match(texts: list[str], references: list[str]) -> dict[str, float]:
    """Share of the rows that are the reference, but for space around it. :returns: exact_match."""
    same = [text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)]
    return {"exact_match": float(np.mean(same))}


def perplexity(loss: float, tokens: int) -> dict[str, float]:
    """How many tokens the model is as unsure between as if they were equally likely.

    :param loss: cross-entropy in nats, the sum over tokens: long rows count for more than short ones.
    :returns: perplexity, from 1; infinite beyond the largest float.
    """
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(np.float64(loss) / tokens))}
