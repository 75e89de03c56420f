"""Losses of embeddings, by sentence-transformers, over groups of rows. Knows nothing of texts and of models."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hfbatch.train.recipes.base import IGNORED


def make_loss(name: str, scale: float, margin: float) -> Any:
    """A loss of sentence-transformers, called with a group's vectors and labels; both as in `sum_over_groups`.

    :param name: ranking (MultipleNegativesRankingLoss), triplet (TripletLoss), cosent (CoSENTLoss) or cosine
        (CosineSimilarityLoss).
    :param scale: of cosines in ranking and cosent.
    :param margin: of triplet.
    """
    from sentence_transformers.sentence_transformer import losses

    nothing: Any = None  # in place of a model: the vectors are there
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
    """MultipleNegativesRankingLoss in which no text is a negative that is a right answer too."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim

    nothing: Any = None
    right = right_answers(labels)

    def similarity(anchors: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        return cos_sim(anchors, documents).masked_fill(right, float("-inf"))

    loss: Any = MultipleNegativesRankingLoss(nothing, scale=scale, similarity_fct=similarity)
    return loss.compute_loss_from_embeddings(list(vectors.unbind(1)), labels)


def right_answers(keys: torch.Tensor) -> torch.Tensor:
    """Which documents of a group are no negatives for an anchor, beside its own positive: bool [rows, documents].

    Those with the anchor's own text, and those with the text of a positive of an equal anchor.

    :param keys: of anchor, positive and, if there are any, negative, int64 [rows, texts]; equal for equal texts.
        Documents are all positives, then all negatives.
    """
    anchors, documents = keys[:, :1], keys[:, 1:].T.reshape(1, -1)
    equal, positive = (anchors == anchors.T).float(), (keys[:, 1:2] == documents).float()
    found = (equal @ positive > 0) | (documents == anchors)
    return found & ~torch.eye(*found.shape, dtype=torch.bool, device=keys.device)


def sum_over_groups(loss: Any, vectors: torch.Tensor, labels: torch.Tensor, group: int) -> torch.Tensor:
    """Sum over all labels of the mean loss of their group; rows that are IGNORED are in none.

    :param vectors: float32 [rows, texts, dimension].
    :param labels: float32 [rows] or int64 [rows, texts].
    """
    kept = labels.reshape(len(labels), -1).ne(IGNORED).all(1)
    vectors, labels = vectors[kept], labels[kept]
    total = vectors.sum() * 0  # has a gradient where no row is left
    for start in range(0, len(labels), group):
        part = labels[start : start + group]
        total = total + loss(vectors[start : start + group], part) * part.numel()
    return total


def of_all_workers(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Vectors and labels of the pass that all workers are in, in the order of the rows, and how many workers these are.

    Gradients find their way back to the worker whose vectors they are of.
    """
    if not dist.is_initialized():
        return vectors, labels, 1
    from torch.distributed.nn import all_gather

    parts = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(all_gather(vectors.contiguous())), torch.cat(parts), len(parts)
