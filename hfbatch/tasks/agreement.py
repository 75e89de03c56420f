"""How closely a model in lowered precision agrees with the same model in float32: measures for vectors, texts and images.

Labels, answers and items are compared in `answer_agreement`.

Does not import torch. A task names its measure in `Task.agreement`; measures compare output columns of the same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks.similarity import (
    NEIGHBOURS,
    change_by_spread,
    cosine,
    neighbour_overlap,
    numbers,
    pixels,
    similarity,
    vectors,
)

Columns = Mapping[str, pa.Array]
"""Output columns by name, all of one length."""


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


SPREAD = Limit(0.1, most=True)
"""Of a change relative to the spread of the values; vectors that change by a tenth of their length have a cosine of 0.995."""


@dataclass(frozen=True)
class Comparison:
    """The agreement of two models on the same rows."""

    rows: np.ndarray
    """Agreement of each row, float64 in 0 to 1."""
    measures: dict[str, float]
    """The values of the measures that these rows have."""
    lacking: str = ""
    """What no row has in either model, so that nothing was compared, such as `an item`; empty if something was."""


class Agreement:
    """Measures of agreement, and what they must reach."""

    row: ClassVar[str]
    """What the agreement of one row is, for the report."""
    limits: Mapping[str, Limit]
    """The default limit of each measure."""


class ColumnAgreement(Agreement, ABC):
    """Measures of an output column. Rows without an answer in either model count in no measure. :param column: its name."""

    def __init__(self, column: str) -> None:
        self.column = column

    @abstractmethod
    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Compares the columns of at least one row."""


class Vectors(ColumnAgreement):
    """Embeddings and features: cosine similarity, change relative to the spread of the vectors, and overlap of nearest neighbours."""

    row = "cosine similarity"
    limits: Mapping[str, Limit] = {
        "cosine_mean": Limit(0.995),
        "cosine_min": Limit(0.98),
        "spread_change": Limit(0.5, most=True),
        "top10_overlap": Limit(),
    }

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Cosine of each row; lists over tokens count as one long vector, and as one vector each for the spread.

        The cosine does not see what vectors with a large common part do to each other, nor their length.
        """
        lists = list(rows_of(reference, found, self.column))
        pairs = [(numbers(a), numbers(b)) for a, b in lists]
        one, other = ([vector for pair in lists for vector in vectors(pair[side])] for side in (0, 1))
        return self.measured(pairs, one, other)

    def measured(
        self, pairs: list[tuple[np.ndarray, np.ndarray]], one: list[np.ndarray], other: list[np.ndarray]
    ) -> Comparison:
        """Returns the measures. :param one: the vectors of the reference, as many as rows or more; other: those found."""
        cosines = np.array([cosine(a, b) for a, b in pairs])
        measures = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
        if len({vector.size for vector in (*one, *other)}) == 1 and len(one) == len(other):
            measures["spread_change"] = change_by_spread(np.stack(one), np.stack(other))
        if len(pairs) > 4 * NEIGHBOURS and len({a.size for a, _ in pairs}) == 1:
            measures["top10_overlap"] = neighbour_overlap(
                *(np.stack(side) for side in zip(*pairs, strict=True))
            )
        return Comparison(np.clip(cosines, 0, 1), measures)


class SparseVectors(Vectors):
    """Sparse vectors, as a column of indices and one of values: the measures of vectors, zeros included.

    :param indices: the column of indices.
    :param values: the column of values.
    """

    def __init__(self, indices: str, values: str) -> None:
        super().__init__(values)
        self.indices = indices

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """Compares the dimensions that any row of either model has; the others are zero in all of them."""
        every = [np.asarray(one[self.indices].flatten()) for one in (reference, found)]
        dimensions = np.unique(np.concatenate(every))
        one, other = (self._dense(columns, dimensions) for columns in (reference, found))
        return self.measured(list(zip(one, other, strict=True)), one, other)

    def _dense(self, columns: Columns, dimensions: np.ndarray) -> list[np.ndarray]:
        """Returns each row as float64 [dimensions]. :param dimensions: sorted."""
        counts = columns[self.indices].value_lengths().to_numpy()
        dense = np.zeros((len(counts), max(len(dimensions), 1)))
        places = np.searchsorted(dimensions, np.asarray(columns[self.indices].flatten()))
        dense[np.repeat(np.arange(len(counts)), counts), places] = np.asarray(columns[self.column].flatten())
        return list(dense)


class Ranking(ColumnAgreement):
    """Scores of the documents of a row: whether the best document is the same, cosine of the scores, and how much they change."""

    row = "whether the best document is the same"
    limits: Mapping[str, Limit] = {
        "agreement": Limit(0.97),
        "cosine_mean": Limit(0.995),
        "score_change_mean": Limit(0.05, most=True),
        "spread_change": SPREAD,
    }

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """The changes are those of all documents, relative for scores above 1, or to the spread of all scores: rows with a single
        document have nothing else to compare.
        """
        pairs = [(numbers(a), numbers(b)) for a, b in rows_of(reference, found, self.column)]
        same = np.array([not a.size or a.argmax() == b.argmax() for a, b in pairs], np.float64)
        there = np.array([a.size > 0 for a, _ in pairs])
        if not there.any():
            return Comparison(same, {}, "a document")
        cosines = np.array([cosine(a, b) for a, b in pairs])
        one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
        change = np.abs(one - other) / np.maximum(np.abs(one), 1)
        return Comparison(
            same,
            {
                "agreement": float(same[there].mean()),
                "cosine_mean": float(cosines[there].mean()),
                "score_change_mean": float(change.mean()),
                "spread_change": change_by_spread(one, other),
            },
        )


class Texts(ColumnAgreement):
    """Texts: the share that is equal, and the similarity of the others."""

    row = "similarity of the text"
    limits: Mapping[str, Limit] = {"similarity_mean": Limit(0.97), "equal": Limit()}

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """The similarity is the share of characters in common blocks, see difflib.SequenceMatcher.ratio."""
        pairs = [(str(a), str(b)) for a, b in rows_of(reference, found, self.column)]
        rows = np.array([similarity(a, b) for a, b in pairs])
        there = np.array([bool(a.strip() or b.strip()) for a, b in pairs])
        if not there.any():
            return Comparison(rows, {}, "a text")
        equal = float(np.array([a == b for a, b in pairs])[there].mean())
        return Comparison(rows, {"similarity_mean": float(rows[there].mean()), "equal": equal})


class GeneratedTexts(Texts):
    """Texts that a model generates freely: they may part at a word and be as good, so that nothing is limited unasked."""

    limits: Mapping[str, Limit] = {"similarity_mean": Limit(), "equal": Limit()}


class Likelihood(Agreement):
    """Generated tokens: their probability and the most probable tokens in both models, see `Task.compare_models`."""

    row = "1 less the mean change of log-probability of a text's tokens"
    limits: Mapping[str, Limit] = {
        "log_prob_change_mean": Limit(0.2, most=True),
        "next_token_agreement": Limit(0.9),
    }


class Pixels(ColumnAgreement):
    """Depth maps and images: difference relative to the range of all values, and to the spread of each row's."""

    row = "1 less the mean difference of the pixels"
    limits: Mapping[str, Limit] = {"pixel_change_mean": Limit(0.02, most=True), "spread_change": SPREAD}

    def compare(self, reference: Columns, found: Columns) -> Comparison:
        """The mean absolute difference. It is divided by the range of the reference over all rows, which a single pixel can make
        large, and by the spread of a row; rows of one value have none. Maps of another size have changed altogether.
        """
        pairs = [(pixels(a), pixels(b)) for a, b in rows_of(reference, found, self.column)]
        most, least = max(a.max() for a, _ in pairs), min(a.min() for a, _ in pairs)
        span = most - least or abs(most) or 1.0
        alike = [a.shape == b.shape for a, b in pairs]
        change = np.array(
            [np.abs(a - b).mean() / span if same else 1.0 for same, (a, b) in zip(alike, pairs, strict=True)]
        )
        measures = {"pixel_change_mean": float(change.mean())}
        drawn = [
            change_by_spread(a.ravel(), b.ravel()) if same else 1.0
            for same, (a, b) in zip(alike, pairs, strict=True)
            if np.ptp(a) > 0
        ]
        if drawn:
            measures["spread_change"] = float(np.mean(drawn))
        return Comparison(np.clip(1 - change, 0, 1), measures)


def rows_of(reference: Columns, found: Columns, column: str) -> Iterator[tuple[Any, Any]]:
    """Yields the values of each row."""
    return zip(reference[column].to_pylist(), found[column].to_pylist(), strict=True)
