"""Losses of embeddings, by sentence-transformers, over groups of rows. Takes vectors, not texts or models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hfbatch.train.recipes.base import IGNORED


def make_loss(name: str, scale: float, margin: float) -> Any:
    """Returns a loss of sentence-transformers, called with a group's vectors and labels as in `sum_over_groups`.

    :param name: ranking (MultipleNegativesRankingLoss), triplet (TripletLoss), cosent (CoSENTLoss) or cosine
        (CosineSimilarityLoss).
    :param scale: factor of cosines in ranking and cosent.
    :param margin: margin of triplet.
    """
    from sentence_transformers.sentence_transformer import losses

    nothing: Any = None  # in place of a model, which the losses do not need for given vectors
    if name == "triplet":
        found: Any = losses.TripletLoss(nothing, triplet_margin=margin)
    elif name == "cosent":
        found = losses.CoSENTLoss(nothing, scale=scale)
    elif name == "cosine":
        found = losses.CosineSimilarityLoss(nothing)
    else:
        return lambda vectors, labels: _ranking(vectors, labels, scale)
    return lambda vectors, labels: found.compute_loss_from_embeddings(list(vectors.unbind(1)), labels)


def _ranking(vectors: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Computes MultipleNegativesRankingLoss without the negatives that are also right answers."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim

    nothing: Any = None
    right = right_answers(labels)

    def similarity(anchors: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return cos_sim(anchors, documents).masked_fill(right, float("-inf"))

    loss: Any = MultipleNegativesRankingLoss(nothing, scale=scale, similarity_fct=similarity)
    return loss.compute_loss_from_embeddings(list(vectors.unbind(1)), labels)


def right_answers(keys: torch.Tensor) -> torch.Tensor:
    """Returns which documents, besides its own positive, are not negatives of an anchor: bool [rows, documents].

    These are documents equal to the anchor, and documents equal to a positive of an equal anchor.

    :param keys: keys of anchor, positive and, if there are any, negative, int64 [rows, texts]; equal for equal texts.
        Documents are all positives, then all negatives.
    """
    anchors, documents = keys[:, :1], keys[:, 1:].T.reshape(1, -1)
    equal, positive = (anchors == anchors.T).float(), (keys[:, 1:2] == documents).float()
    found = (equal @ positive > 0) | (documents == anchors)
    return found & ~torch.eye(*found.shape, dtype=torch.bool, device=keys.device)


def sum_over_groups(loss: Any, vectors: torch.Tensor, labels: torch.Tensor, group: int) -> torch.Tensor:
    """Sums the mean loss of each label's group over all labels; rows that are IGNORED are in no group.

    :param vectors: float32 [rows, texts, dimension].
    :param labels: float32 [rows] or int64 [rows, texts].
    """
    kept = labels.reshape(len(labels), -1).ne(IGNORED).all(1)
    vectors, labels = vectors[kept], labels[kept]
    total = vectors.sum() * 0  # keeps a gradient if no row is left
    for start in range(0, len(labels), group):
        part = labels[start : start + group]
        total = total + loss(vectors[start : start + group], part) * part.numel()
    return total


def of_all_workers(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Gathers vectors and labels of all workers, in the order of the rows; also returns the number of workers.

    Gradients flow back to the worker that computed the vectors.
    """
    if not dist.is_initialized():
        return vectors, labels, 1
    from torch.distributed.nn import all_gather

    parts = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(all_gather(vectors.contiguous())), torch.cat(parts), len(parts)
