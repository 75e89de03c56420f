"""Metrics of answers to questions, by the rules of the SQuAD 2.0 script, which reads SQuAD 1.1 too."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_answer(text: str) -> str:
    """Normalises an answer: lower case, without ASCII punctuation, English articles and extra whitespace."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(truth: str, guess: str) -> float:
    """Returns 1 if two answers are equal after normalisation, else 0."""
    return float(normal_answer(truth) == normal_answer(guess))


def overlap_f1(truth: str, guess: str) -> float:
    """Computes the F1 of the words of two normalised answers; if one has no words, 1 if the other has none, else 0."""
    mine, theirs = normal_answer(truth).split(), normal_answer(guess).split()
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (Counter(mine) & Counter(theirs)).total() / (len(mine) + len(theirs))


def answer_scores(truths: Sequence[Sequence[str]], guesses: Sequence[str]) -> dict[str, float]:
    """Computes metrics of answers, from 0 to 1; each answer is compared with the closest right answer.

    :param truths: right answers of each question; empty if it has none, so that an empty prediction is right.
    :returns: exact_match and f1; if only some of the questions have answers, also by kind: f1_answerable,
        exact_match_answerable, accuracy_unanswerable.
    """
    known = [[truth for truth in row if normal_answer(truth)] or [""] for row in truths]
    pairs = list(zip(known, guesses, strict=True))
    exact = np.array([max(exact_match(truth, guess) for truth in row) for row, guess in pairs])
    f1 = np.array([max(overlap_f1(truth, guess) for truth in row) for row, guess in pairs])
    found = {"exact_match": exact.mean(), "f1": f1.mean()}
    has = np.array([row != [""] for row in known])
    if has.any() and not has.all():
        found |= {
            "exact_match_answerable": exact[has].mean(),
            "f1_answerable": f1[has].mean(),
            "accuracy_unanswerable": exact[~has].mean(),
        }
    return {name: float(value) for name, value in found.items()}
