"""Metrics of embeddings: retrieval of each anchor's positive among all of them, by cosine similarity."""

from __future__ import annotations

import numpy as np

SCORES = 1 << 24
"""Maximum number of cosines held in memory."""
DEPTH = 10
"""Highest rank that counts for mrr_at_10."""


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors to length 1, float [..., dimension]; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Computes the cosine similarity of paired vectors: float [rows] from float [rows, dimension] each."""
    return np.einsum("ij,ij->i", normalized(one), normalized(other))


def retrieval(
    anchors: np.ndarray, positives: np.ndarray, anchor_keys: np.ndarray, positive_keys: np.ndarray
) -> dict[str, float]:
    """Computes how high anchors rank their own positive among those of all rows, by cosine similarity.

    Equal texts are one document. Other positives of an equal anchor are excluded from its ranking, and documents
    tied with the positive rank before it.

    :param anchors: float32 [rows, dimension]; `positives` likewise.
    :param anchor_keys: int64 [rows], equal for equal texts; `positive_keys` likewise.
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
    """Returns the rank of each row's positive, from 1, int64 [rows]; see `retrieval`."""
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
    """Computes the share of rows whose anchor is closer to the positive, by cosine: float [rows, dimension] each."""
    return float((cosines(anchors, positives) > cosines(anchors, negatives)).mean())
