"""How closely a model in lowered precision agrees with the same model in float32: a measure for each kind of output.

Does not import torch. A task names its measure in `Task.agreement`; measures compare output columns of the same rows.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

Columns = Mapping[str, pa.Array]
"""Output columns by name, all of one length."""
NEIGHBOURS = 10
"""Nearest rows that are compared for each row."""
LONG = 2000
"""Characters of two texts from which words are compared: the time grows with the square of the number of pieces."""
WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u9fff]+\s*|.", re.DOTALL)
"""A word with the space behind it, or a character of a script without spaces."""
CLOSE = 0.05
"""Difference up to which two numbers are the same answer, relative above 1."""
OVERLAP = 0.5
"""Intersection over union above which two boxes are the same object, as in Pascal VOC."""


@dataclass(frozen=True)
class Limit:
    """What a measure must reach."""

    value: float | None = None
    """None: the measure is reported, and has no limit unless the spec sets one."""
    most: bool = False
    """Whether the value is an upper limit; otherwise it is a lower one."""

    def holds(self, measured: float) -> bool:
        """Whether a value is within the limit; NaN never is."""
        return self.value is None or (measured <= self.value if self.most else measured >= self.value)

    def __str__(self) -> str:
        return f"{'at most' if self.most else 'at least'} {self.value:g}" if self.value is not None else ""


@dataclass(frozen=True)
class Comparison:
    """The agreement of two models on the same rows."""

    rows: np.ndarray
    """Agreement of each row, float64 in 0 to 1."""
    measures: dict[str, float]
    """The values of the measures."""


class Agreement:
    """Measures of agreement, and what they must reach."""

    row: ClassVar[str]
    """What the agreement of one row is, for the report."""
    limits: ClassVar[Mapping[str, Limit]]
    """The default limit of each measure."""


class ColumnAgreement(Agreement, ABC):
    """Measures of an output column. :param column: its name."""

    def __init__(self, column: str) -> None:
        self.column = column

    @abstractmethod
    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Compares the columns of at least one row."""


class Vectors(ColumnAgreement):
    """Embeddings and features: cosine similarity, and the overlap of the nearest neighbours among the rows."""

    row = "cosine similarity"
    limits: ClassVar[Mapping[str, Limit]] = {
        "cosine_mean": Limit(0.995),
        "cosine_min": Limit(0.98),
        "top10_overlap": Limit(),
    }

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Cosine of each row; lists over tokens count as one long vector."""
        pairs = [(_numbers(a), _numbers(b)) for a, b in _rows(reference, found, self.column)]
        cosines = np.array([_cosine(a, b) for a, b in pairs])
        measures = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
        if len(pairs) > 4 * NEIGHBOURS and len({a.size for a, _ in pairs}) == 1:
            measures["top10_overlap"] = _neighbour_overlap(
                *(np.stack(side) for side in zip(*pairs, strict=True))
            )
        return Comparison(np.clip(cosines, 0, 1), measures)


class Best(ColumnAgreement):
    """Labels and answers: whether the best one is the same, and how much its score changes.

    :param column: labels or structs, or lists of them, best first.
    :param score: the column of scores, or the field of the structs.
    """

    row = "1 less the change of the best score, 0 for another answer"
    limits: ClassVar[Mapping[str, Limit]] = {
        "agreement": Limit(0.98),
        "score_change_mean": Limit(0.05, most=True),
        "score_change_max": Limit(most=True),
    }

    def __init__(self, column: str, score: str = "score") -> None:
        super().__init__(column)
        self.score = score

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Compares what does not vary continuously: texts, integers and booleans. Changes of scores above 1 are relative."""
        one, other = self._best(reference), self._best(found)
        same = np.array([a == b for (a, _), (b, _) in zip(one, other, strict=True)])
        change = np.array([abs(a - b) / max(abs(a), 1) for (_, a), (_, b) in zip(one, other, strict=True)])
        return Comparison(
            np.where(same, np.clip(1 - change, 0, 1), 0.0),
            {
                "agreement": float(same.mean()),
                "score_change_mean": float(change.mean()),
                "score_change_max": float(change.max()),
            },
        )

    def _best(self, columns: Columns) -> list[tuple[Any, float]]:
        """The best answer and its score, of each row."""
        answers = [_first(value) for value in columns[self.column].to_pylist()]
        if self.score in columns:
            scores = [_first(value) for value in columns[self.score].to_pylist()]
        else:
            scores = [answer.get(self.score) if isinstance(answer, dict) else None for answer in answers]
        return [(_discrete(answer), score or 0.0) for answer, score in zip(answers, scores, strict=True)]


class Ranking(ColumnAgreement):
    """Scores of the documents of a row: whether the best document is the same, cosine of the scores, and how much they change."""

    row = "whether the best document is the same"
    limits: ClassVar[Mapping[str, Limit]] = {
        "agreement": Limit(0.97),
        "cosine_mean": Limit(0.995),
        "score_change_mean": Limit(0.05, most=True),
    }

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Rows without documents agree. The change is that of all documents, relative for scores above 1: rows with a single document
        have nothing else to compare.
        """
        pairs = [(_numbers(a), _numbers(b)) for a, b in _rows(reference, found, self.column)]
        same = np.array([not a.size or a.argmax() == b.argmax() for a, b in pairs], np.float64)
        cosines = [_cosine(a, b) for a, b in pairs]
        one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
        change = np.abs(one - other) / np.maximum(np.abs(one), 1)
        measures = {"agreement": float(same.mean()), "cosine_mean": float(np.mean(cosines))}
        return Comparison(same, measures | {"score_change_mean": float(change.sum() / max(len(change), 1))})


class Items(ColumnAgreement):
    """Entities, objects and masks, any number in a row: F1 of those of the one model as predictions of the other's.

    :param place: the field of an item that says where it is, if the same place may have slightly different values.
    :param overlap: the intersection over union of two places.
    :param numbers: fields of an item that are answers, and no measure of one: they differ by at most CLOSE.
    """

    row = "F1 of a row"
    limits: ClassVar[Mapping[str, Limit]] = {"f1": Limit(0.98)}

    def __init__(
        self,
        column: str,
        place: str | None = None,
        overlap: Callable[[Any, Any], float] | None = None,
        numbers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(column)
        self.place, self.overlap, self.numbers = place, overlap, numbers

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Counts the items that both have; rows without any agree."""
        counts = np.array(
            [
                (self._matches(a or [], b or []), len(a or []), len(b or []))
                for a, b in _rows(reference, found, self.column)
            ]
        )
        both, one, other = counts.sum(0)
        items = counts[:, 1:].sum(1)
        rows = np.where(items, 2 * counts[:, 0] / np.maximum(items, 1), 1.0)
        return Comparison(rows, {"f1": float(2 * both / (one + other)) if one + other else 1.0})

    def _matches(self, reference: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> int:
        """Returns the number of items that both have, each counted once."""
        free, count = list(found), 0
        for item in reference:
            match = next((k for k, other in enumerate(free) if self._same(item, other)), None)
            if match is not None:
                count += 1
                free.pop(match)
        return count

    def _same(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        """Returns whether two items are alike, and at the same place."""
        if self.place is None or self.overlap is None:
            close = all(_is_close(a[name], b[name]) for name in self.numbers)
            return close and bool(_discrete(dict(a)) == _discrete(dict(b)))
        return a.get("label") == b.get("label") and self.overlap(a[self.place], b[self.place]) >= OVERLAP


class Texts(ColumnAgreement):
    """Texts: the share that is equal, and the similarity of the others."""

    row = "similarity of the text"
    limits: ClassVar[Mapping[str, Limit]] = {"similarity_mean": Limit(0.97), "equal": Limit()}

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """The similarity is the share of characters in common blocks, see difflib.SequenceMatcher.ratio."""
        pairs = [(str(a), str(b)) for a, b in _rows(reference, found, self.column)]
        rows = np.array([_similarity(a, b) for a, b in pairs])
        equal = float(np.mean([a == b for a, b in pairs]))
        return Comparison(rows, {"similarity_mean": float(rows.mean()), "equal": equal})


class GeneratedTexts(Texts):
    """Texts that a model generates freely: they may part at a word and be as good, so that nothing is limited unasked."""

    limits: ClassVar[Mapping[str, Limit]] = {"similarity_mean": Limit(), "equal": Limit()}


class Likelihood(Agreement):
    """Generated tokens: their probability and the most probable tokens in both models, see `Task.compare_models`."""

    row = "1 less the mean change of log-probability of a text's tokens"
    limits: ClassVar[Mapping[str, Limit]] = {
        "log_prob_change_mean": Limit(0.2, most=True),
        "next_token_agreement": Limit(0.9),
    }


class Pixels(ColumnAgreement):
    """Depth maps and images: difference relative to the range of the values."""

    row = "1 less the mean difference of the pixels"
    limits: ClassVar[Mapping[str, Limit]] = {"pixel_change_mean": Limit(0.02, most=True)}

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """The mean absolute difference, divided by the range of the reference over all rows: a black image has none."""
        pairs = [(_pixels(a), _pixels(b)) for a, b in _rows(reference, found, self.column)]
        span = max(a.max() for a, _ in pairs) - min(a.min() for a, _ in pairs)
        change = np.array([np.abs(a - b).mean() for a, b in pairs]) / max(span, 1e-12)
        return Comparison(np.clip(1 - change, 0, 1), {"pixel_change_mean": float(change.mean())})


def _rows(reference: Columns, found: Columns, column: str) -> Iterator[tuple[Any, Any]]:
    return zip(reference[column].to_pylist(), found[column].to_pylist(), strict=True)


def _numbers(value: Any) -> np.ndarray:
    """Returns nested lists of numbers as one vector."""
    if value and isinstance(value[0], list):
        return np.concatenate([_numbers(one) for one in value])
    return np.array(value or [], np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the cosine similarity; 1 for two vectors of zeros, 0 for vectors of different sizes."""
    if a.shape != b.shape:
        return 0.0
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else float(np.array_equal(a, b))


def _similarity(a: str, b: str) -> float:
    """Returns the share of characters in common blocks, of whole words in long texts, which take too long otherwise."""
    one, other = ([*a], [*b]) if len(a) + len(b) < LONG else (WORD.findall(a), WORD.findall(b))
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    common = sum(len("".join(one[block.a : block.a + block.size])) for block in blocks)
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def _neighbour_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the share of the nearest rows by cosine that both have, over all rows. float64 [rows, width]."""
    nearest = []
    for vectors in (a, b):
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        near = unit @ unit.T
        np.fill_diagonal(near, -2)
        nearest.append(np.argpartition(-near, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    shared = [len(set(one) & set(other)) for one, other in zip(*nearest, strict=True)]
    return float(np.mean(shared)) / NEIGHBOURS


def _first(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _discrete(value: Any) -> Any:
    """Returns what of a value does not vary continuously, in a form that can be compared."""
    if isinstance(value, dict):
        return tuple((key, _discrete(one)) for key, one in value.items())
    if isinstance(value, list):
        return tuple(map(_discrete, value))
    return None if isinstance(value, float | np.floating) else value


def _is_close(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) <= CLOSE * max(abs(a), 1)


def _pixels(value: Any) -> np.ndarray:
    """Returns an image file, or nested lists, as numbers."""
    if not isinstance(value, bytes):
        return np.array(value, np.float64)
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(value)), np.float64)
