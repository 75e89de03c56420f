"""How closely labels, answers and items of a model in lowered precision agree with those of the same model in float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from hfbatch.tasks.agreement import SPREAD, ColumnAgreement, Columns, Comparison, Limit, rows_of
from hfbatch.tasks.similarity import change_by_spread

CLOSE = 0.05
"""Difference up to which two numbers are the same answer, relative above 1."""
OVERLAP = 0.5
"""Intersection over union above which two boxes are the same object, as in Pascal VOC."""
DECISION = 0.5
"""Score from which on a row has a label, where a row can have several."""
FEW = 8
"""Rows that a label or a question needs for a spread of its values, or all rows."""


Ranked = list[tuple[Hashable, float | None]]
"""Answers and their scores, best first."""
Values = dict[Hashable, list[tuple[float, float]]]
"""Numbers in both models, by what they are of."""


class Best(ColumnAgreement):
    """Answers with scores: whether the best one is the same, and how much its score and those of all others change.

    :param column: labels or structs, or lists of them, best first; lists of lists for several answers to a row.
    :param score: the column of scores, or the field of the structs.
    """

    row = "1 less the change of the best score, 0 for another answer"
    limits: Mapping[str, Limit] = {
        "agreement": Limit(0.98),
        "score_change_mean": Limit(0.05, most=True),
        "score_change_max": Limit(most=True),
        "all_scores_change_mean": Limit(0.05, most=True),
    }

    def __init__(self, column: str, score: str = "score") -> None:
        super().__init__(column)
        self.score = score

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Compares what does not vary continuously: texts, integers and booleans. Changes of scores above 1 are relative."""
        pairs = list(zip(self._ranked(reference), self._ranked(found), strict=True))
        there = np.array([bool(one or other) for one, other in pairs])
        if not there.any():
            return Comparison(np.ones(len(pairs)), {}, "an answer")
        lists: list[list[tuple[Ranked, Ranked]]] = [list(zip_longest(*pair, fillvalue=[])) for pair in pairs]
        same = np.array([all(_best(a)[0] == _best(b)[0] for a, b in row) for row in lists])
        change = np.array(
            [max((_change(_best(a)[1], _best(b)[1]) for a, b in row), default=0.0) for row in lists]
        )
        rows = np.where(same, np.clip(1 - change, 0, 1), 0.0)
        measures = {"agreement": float(same[there].mean())}
        several = [pair for row in lists for pair in row]
        if any(score is not None for pair in several for side in pair for _, score in side):
            measures |= {
                "score_change_mean": float(change[there].mean()),
                "score_change_max": float(change.max()),
            }
            if any(len(side) > 1 for pair in several for side in pair):
                largest = [max((_largest_change(a, b) for a, b in row), default=0.0) for row in lists]
                measures["all_scores_change_mean"] = float(np.array(largest)[there].mean())
        return Comparison(rows, measures | self._more(several))

    def _more(self, pairs: list[tuple[Ranked, Ranked]]) -> dict[str, float]:
        """Returns further measures of ranked answers."""
        return {}

    def _ranked(self, columns: Columns) -> list[list[Ranked]]:
        """Returns the ranked answers to each row, one list unless the column has several; none if there is no answer."""
        values = columns[self.column].to_pylist()
        scores = columns[self.score].to_pylist() if self.score in columns else [None] * len(values)
        return [self._answers(value, score) for value, score in zip(values, scores, strict=True)]

    def _answers(self, value: Any, scores: Any) -> list[Ranked]:
        answers = value if isinstance(value, list) else [value]
        if answers and isinstance(answers[0], list):
            return [ranked for one in answers for ranked in self._answers(one, None)]
        given = scores if isinstance(scores, list) else [scores] * len(answers)
        found = [
            (_discrete(answer), answer.get(self.score) if isinstance(answer, dict) else score)
            for answer, score in zip(answers, given, strict=True)
        ]
        found = [(answer, score) for answer, score in found if answer not in (None, "") or score is not None]
        return [found] if found else []


class Labels(Best):
    """Labels of a classifier; where its scores do not exclude each other, also the labels above the decision limit, and the
    change of each label's scores beside their spread over the rows.

    :param function: what makes scores of logits: softmax, sigmoid or none.
    """

    limits: Mapping[str, Limit] = {**Best.limits, "labels_f1": Limit(0.98), "spread_change": SPREAD}

    def __init__(self, column: str, score: str = "score", function: str = "softmax") -> None:
        super().__init__(column, score)
        self.function = function

    def _more(self, pairs: list[tuple[Ranked, Ranked]]) -> dict[str, float]:
        """The spread is that of each label, of which the worst counts: a regression has a label for each number that it returns."""
        measures: dict[str, float] = {}
        if self.function == "softmax":
            return measures
        if self.function == "sigmoid":
            sets = [
                [{label for label, score in side if (score or 0) >= DECISION} for side in pair]
                for pair in pairs
            ]
            one, other = (sum(len(pair[side]) for pair in sets) for side in (0, 1))
            if one + other:
                measures["labels_f1"] = 2 * sum(len(a & b) for a, b in sets) / (one + other)
        values: Values = defaultdict(list)
        for a, b in pairs:
            scores = dict(b)
            for label, score in a:
                changed = scores.get(label)
                if score is not None and changed is not None:
                    values[label].append((score, changed))
        return measures | _spread_change(values, len(pairs))


class Items(ColumnAgreement):
    """Entities, objects and masks, any number in a row: F1 of those of the one model as predictions of the other's.

    :param place: the field of an item that says where it is, if the same place may have slightly different values.
    :param overlap: the intersection over union of two places; 0 for two empty ones.
    :param numbers: fields of an item that are answers, and no measure of one: they differ by at most CLOSE.
    :param read: decodes a place.
    """

    row = "F1 of a row"

    def __init__(
        self,
        column: str,
        place: str | None = None,
        overlap: Callable[[Any, Any], float] | None = None,
        numbers: tuple[str, ...] = (),
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(column)
        self.place, self.overlap, self.numbers, self.read = place, overlap, numbers, read
        self.limits = {"f1": Limit(0.98), "items": Limit()}
        if numbers:
            self.limits["spread_change"] = SPREAD
        else:
            self.limits["score_change_mean"] = Limit(0.05, most=True)
        if place:
            self.limits["overlap_mean"] = Limit()

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Counts the items that both have. An item at an empty place, such as a mask of no pixel, is none."""
        pairs = [[self._items(side) for side in row] for row in rows_of(reference, found, self.column)]
        matches = [self._matches(one, other) for one, other in pairs]
        counts = np.array([(len(both), len(a), len(b)) for both, (a, b) in zip(matches, pairs, strict=True)])
        both, one, other = counts.sum(0)
        items = counts[:, 1:].sum(1)
        rows = np.where(items, 2 * counts[:, 0] / np.maximum(items, 1), 1.0)
        if not one + other:
            return Comparison(rows, {}, "an item")
        measures = {"f1": float(2 * both / (one + other)), "items": float(one)}
        alike = [match for row in matches for match in row]
        scores = [(a.get("score"), b.get("score")) for a, b, _ in alike]
        changes = [abs(a - b) for a, b in scores if a is not None and b is not None]
        if changes and not self.numbers:
            measures["score_change_mean"] = float(np.mean(changes))
        if alike and self.place:
            measures["overlap_mean"] = float(np.mean([overlap for *_, overlap in alike]))
        return Comparison(rows, measures | self._number_changes(pairs))

    def _items(self, value: Any) -> list[Mapping[str, Any]]:
        """Returns the items of a row, with their places decoded."""
        items = list(value or [])
        if self.place is None or self.overlap is None:
            return items
        if self.read is not None:
            items = [{**item, self.place: self.read(item[self.place])} for item in items]
        return [item for item in items if self.overlap(item[self.place], item[self.place]) > 0]

    def _matches(
        self, reference: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
    ) -> list[tuple[Mapping[str, Any], Mapping[str, Any], float]]:
        """Returns the items that both have, each once, with the overlap of their places."""
        free, matches = list(found), []
        for item in reference:
            overlaps = (self._overlap(item, other) for other in free)
            match = next(((k, overlap) for k, overlap in enumerate(overlaps) if overlap), None)
            if match is not None:
                matches.append((item, free.pop(match[0]), match[1]))
        return matches

    def _overlap(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
        """Returns the overlap of two items that are alike and at the same place; 0 for others."""
        if self.place is None or self.overlap is None:
            close = all(_is_close(a[name], b[name]) for name in self.numbers)
            return float(close and _discrete(a) == _discrete(b))
        overlap = self.overlap(a[self.place], b[self.place]) if a.get("label") == b.get("label") else 0.0
        return overlap if overlap >= OVERLAP else 0.0

    def _number_changes(self, pairs: list[list[list[Mapping[str, Any]]]]) -> dict[str, float]:
        """Returns the change of the numbers that are answers to the same question, beside their spread over the rows."""
        values: Values = defaultdict(list)
        for one, other in pairs if self.numbers else ():
            there = {_discrete(item): item for item in other}
            for item in one:
                key = _discrete(item)
                for name in self.numbers if key in there else ():
                    if item[name] is not None and there[key][name] is not None:
                        values[key, name].append((item[name], there[key][name]))
        return _spread_change(values, len(pairs))


def _best(ranked: Ranked) -> tuple[Hashable, float]:
    """Returns the best answer and its score."""
    answer, score = ranked[0] if ranked else (None, None)
    return answer, score or 0.0


def _change(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), 1)


def _largest_change(reference: Ranked, found: Ranked) -> float:
    """Returns the largest change of an answer's score. One that a model does not return has at most the lowest score that it does."""
    one, other = ({answer: score or 0.0 for answer, score in reversed(side)} for side in (reference, found))
    least, least_other = (min(side.values(), default=0.0) for side in (one, other))
    changes = [_change(score, other.get(answer, min(score, least_other))) for answer, score in one.items()]
    changes += [_change(min(score, least), score) for answer, score in other.items() if answer not in one]
    return max(changes, default=0.0)


def _spread_change(values: Values, rows: int) -> dict[str, float]:
    """Returns the measure `spread_change` of the kind of value that changes most; none if all are of too few rows."""
    known = [np.array(pairs) for pairs in values.values() if len(pairs) >= min(FEW, rows)]
    changes = [change_by_spread(pairs[:, 0], pairs[:, 1]) for pairs in known]
    return {"spread_change": max(changes)} if changes else {}


def _discrete(value: Any) -> Any:
    """Returns what of a value does not vary continuously, in a form that can be compared."""
    if isinstance(value, Mapping):
        return tuple((key, _discrete(one)) for key, one in value.items())
    if isinstance(value, list):
        return tuple(map(_discrete, value))
    return None if isinstance(value, float | np.floating) else value


def _is_close(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) <= CLOSE * max(abs(a), 1)
