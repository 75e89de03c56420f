"""Metrics of embeddings: whether cosines go with scores, and find an anchor's positive among all of them."""

from __future__ import annotations

import numpy as np

SCORES = 1 << 24
"""Cosines that are in memory at a time."""
DEPTH = 10
"""Ranks that count for mrr_at_10."""


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Vectors at length 1, float [..., dimension]; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each vector and its partner: float [rows] of float [rows, dimension] both."""
    return np.einsum("ij,ij->i", normalized(one), normalized(other))


def retrieval(
    anchors: np.ndarray, positives: np.ndarray, anchor_keys: np.ndarray, positive_keys: np.ndarray
) -> dict[str, float]:
    """How well anchors find their positive among those of all rows, by cosine.

    Equal texts are one document. Other positives of an equal anchor are out of the contest, and a document that
    is as near as the positive goes before it.

    :param anchors: float32 [rows, dimension]; `positives` alike.
    :param anchor_keys: int64 [rows], equal for equal texts; `positive_keys` alike.
    :returns: accuracy_at_1: share of rows whose positive is the nearest; mrr_at_10: mean of 1 / rank, 0 beyond
        rank 10.
    """
    ranks = ranks_of(anchors, positives, anchor_keys, positive_keys)
    return {
        "accuracy_at_1": float((ranks == 1).mean()),
        "mrr_at_10": float(np.where(ranks <= DEPTH, 1 / ranks, 0).mean()),
    }


def ranks_of(
    anchors: np.ndarray, positives: np.ndarray, anchor_keys: np.ndarray, positive_keys: np.ndarray
) -> np.ndarray:
    """The rank of each row's positive, from 1, int64 [rows]; see `retrieval`."""
    from scipy.sparse import csr_array

    _, first, document = np.unique(positive_keys, return_index=True, return_inverse=True)
    _, query = np.unique(anchor_keys, return_inverse=True)
    right = csr_array((np.ones(len(query), bool), (query, document)))
    left, pool = normalized(anchors), normalized(positives[first]).T
    ranks = np.empty(len(left), np.int64)
    step = max(SCORES // len(first), 1)
    for start in range(0, len(left), step):
        rows = slice(start, start + step)
        scores = left[rows] @ pool
        own = scores[np.arange(len(scores)), document[rows]]
        scores[right[query[rows]].nonzero()] = -np.inf
        ranks[rows] = 1 + (scores >= own[:, None]).sum(axis=1)
    return ranks


def triplet_accuracy(anchors: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> float:
    """Share of rows whose anchor is nearer to the positive, by cosine: float [rows, dimension] each."""
    return float((cosines(anchors, positives) > cosines(anchors, negatives)).mean())
