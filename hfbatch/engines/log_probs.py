"""Log-probabilities of tokens that a model has generated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch


def log_probs_of(model: Any, inputs: Mapping[str, torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """Returns the model's log-probability of each new token, float32 [new].

    :param inputs: model inputs of one text without padding, up to the token before the last new one.
    :param new: new tokens, int64 [1, new].
    """
    return distributions(model, inputs, new.shape[1]).gather(1, new[0, :, None])[:, 0]


def distributions(model: Any, inputs: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """Returns the log-probability of every token at the last positions, float32 [length, vocabulary].

    :param inputs: see `log_probs_of`.
    """
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": length} if keep else {}
    return model(**inputs, **options, use_cache=False).logits[0, -length:].float().log_softmax(dim=-1)
