"""Metrics of tagged spans, by the rules of the CoNLL shared tasks' script (conlleval)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
"""The tag of words outside of spans."""
PREFIXES = ("B-", "I-")
MOST_KINDS = 10
"""Up to so many kinds of span, each kind gets its own F1."""


def split_tag(tag: str) -> tuple[bool, str]:
    """Returns whether a tag always begins a span, and the kind of span; empty for O.

    A plain tag, without B- or I-, is the kind.
    """
    if tag.startswith(PREFIXES):
        return tag.startswith("B-"), tag[2:]
    return False, "" if tag == OUTSIDE else tag


def to_iob2(tags: Iterable[str]) -> list[str]:
    """Converts tags in IOB1 or IOB2 to IOB2, where B- begins each span; plain tags are unchanged.

    In both, a span begins at B-, and at I- if the previous word is in no span or in one of another kind.
    """
    made, before = [], ""
    for tag in tags:
        begins, kind = split_tag(tag)
        begins = begins or kind != before
        made.append(PREFIXES[not begins] + kind if tag.startswith(PREFIXES) else tag)
        before = kind
    return made


def spans_of(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """Returns the kind, first word and end (exclusive) of each span; reads tags as `to_iob2` does."""
    spans: list[tuple[str, int, int]] = []
    before = ""
    for place, tag in enumerate(tags):
        begins, kind = split_tag(tag)
        if kind and (begins or kind != before):
            spans.append((kind, place, place + 1))
        elif kind:
            spans[-1] = (*spans[-1][:2], place + 1)
        before = kind
    return spans


def span_scores(truth: Sequence[Sequence[str]], guess: Sequence[Sequence[str]]) -> dict[str, float]:
    """Computes metrics of spans; a span is right if its kind, first and last word are right.

    :param truth: tags of each text's words in IOB1 or IOB2, or plain; `guess` likewise.
    :returns: precision, recall and f1 over all spans (0 if there are none); accuracy of the words' tags in IOB2;
        f1_KIND for each kind of span in truth, if there are at most 10.
    """
    there, said, right = Counter[str](), Counter[str](), Counter[str]()
    words = hits = 0
    for mine, theirs in zip(truth, guess, strict=True):
        real, found = spans_of(mine), spans_of(theirs)
        there.update(kind for kind, *_ in real)
        said.update(kind for kind, *_ in found)
        right.update(kind for kind, *_ in set(real) & set(found))
        words += len(mine)
        hits += sum(a == b for a, b in zip(to_iob2(mine), to_iob2(theirs), strict=True))
    precision, recall, f1 = _rates(right.total(), said.total(), there.total())
    metrics = {"precision": precision, "recall": recall, "f1": f1, "accuracy": hits / words if words else 0.0}
    if len(there) <= MOST_KINDS:
        metrics |= {f"f1_{kind}": _rates(right[kind], said[kind], there[kind])[2] for kind in sorted(there)}
    return metrics


def _rates(right: int, said: int, there: int) -> tuple[float, float, float]:
    """Computes precision, recall and F1."""
    precision = right / said if said else 0.0
    recall = right / there if there else 0.0
    return precision, recall, 2 * right / (said + there) if said + there else 0.0
