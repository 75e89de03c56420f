"""Utilities of classification tasks: from logits to the top labels and their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hfbatch.tasks.tokens import flatten

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

LABEL_LISTS = (pa.field("label", pa.list_(pa.string())), pa.field("score", pa.list_(pa.float32())))


def label_names(config: PretrainedConfig) -> list[str]:
    """Returns label names, by class index."""
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def score_function(config: PretrainedConfig) -> str:
    """Returns the function applied to logits (softmax, sigmoid or none), as in transformers' pipelines."""
    if config.problem_type == "regression":
        return "none"
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return "sigmoid"
    return "softmax"


def best_labels(logits: torch.Tensor, function: str, count: int) -> dict[str, torch.Tensor]:
    """Returns the top labels of each row.

    :param logits: [batch, labels].
    :param function: softmax, sigmoid or none.
    :returns: `label` (class index) int32 and `score` float32, best first: [batch, count].
    """
    import torch

    scores = logits.float()
    if function != "none":
        scores = scores.softmax(-1) if function == "softmax" else scores.sigmoid()
    # Stable, like Python's sort in the pipeline: among equal scores, the lower class index comes first.
    best, index = scores.sort(dim=-1, descending=True, stable=True)
    return {"label": index[:, :count].to(torch.int32).contiguous(), "score": best[:, :count].contiguous()}


def named_lists(outputs: pa.Table, names: list[str]) -> list[pa.Array]:
    """Converts the output of `best_labels` to columns: lists of names and lists of scores."""
    label, score = flatten(outputs["label"]), flatten(outputs["score"])
    offsets = pa.array(np.arange(len(label) + 1, dtype=np.int32) * label.type.list_size)
    values = [pa.array(names, pa.string()).take(label.flatten()), score.flatten()]
    return [pa.ListArray.from_arrays(offsets, one) for one in values]


def best_scores(columns: list[pa.Array]) -> np.ndarray:
    """Returns the first score of each row of `named_lists`, float32 [rows]."""
    scores = flatten(columns[1])
    return scores.values.to_numpy()[scores.offsets.to_numpy()[:-1]]
