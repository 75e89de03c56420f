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
    length = new.shape[1]
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": length} if keep else {}
    scores = model(**inputs, **options, use_cache=False).logits[0, -length:].float().log_softmax(dim=-1)
    return scores.gather(1, new[0, :, None])[:, 0]
