"""Pools token vectors into one vector, and applies the Dense layers that may follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfbatch.tasks.text.sentence_files import Dense

if TYPE_CHECKING:
    import torch


def pool(
    hidden: torch.Tensor, mask: torch.Tensor | None, poolings: tuple[str, ...], skip: int = 0
) -> torch.Tensor:
    """Pools token vectors, in float32.

    :param hidden: [batch, tokens, size], of any float type.
    :param mask: 1 for a token, 0 for padding on either side, [batch, tokens]; None if nothing is padded.
    :param skip: number of tokens at the start of each row to exclude.
    :returns: float32 [batch, size * len(poolings)].
    """
    import torch

    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    place = mask.cumsum(1)
    kept = mask * (place > skip) if skip else mask
    return torch.cat([_pool_one(hidden, kept, place, pooling) for pooling in poolings], dim=-1)


def _pool_one(hidden: torch.Tensor, kept: torch.Tensor, place: torch.Tensor, pooling: str) -> torch.Tensor:
    """Applies one pooling. :param place: each token's position in its row, from 1, int64 [batch, tokens]."""
    import torch

    if pooling in ("cls", "lasttoken"):
        index = (kept if pooling == "cls" else kept * place).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), index].float()
    if pooling == "max":
        return hidden.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).amax(1).float()
    weights = kept * place if pooling == "weightedmean" else kept
    # A matrix product reads the token vectors once and makes no copy of them; it needs equal types, so
    # lower precisions are converted to float32 instead of being summed at low precision.
    total = torch.bmm(weights.unsqueeze(1).float(), hidden.float()).squeeze(1)
    weight = weights.sum(1, keepdim=True).float()
    if pooling == "mean_sqrt_len_tokens":
        weight = weight.sqrt()
    return total / weight.clamp(min=1e-9)


def load_dense(folder: Path, dense: Dense) -> dict[str, torch.Tensor]:
    """Loads the tensors of a Dense module of sentence-transformers, float32, from its safetensors file.

    :raises ValueError: if the file does not match the config.
    """
    from safetensors.torch import load_file

    path = folder / dense.folder / "model.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    needed = ["linear.weight"] + ["residual.weight"] * (
        dense.residual and dense.in_features != dense.out_features
    )
    for name in needed:
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != (dense.out_features, dense.in_features):
            raise ValueError(f"{path}: {name} is {shape}, expected {(dense.out_features, dense.in_features)}")
    return weights


def apply_dense(dense: Dense, weights: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Applies a Dense layer: float32 [batch, in_features] to float32 [batch, out_features]."""
    from torch import nn
    from torch.nn.functional import linear

    activation = getattr(nn, dense.activation)()
    result = activation(linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
    if not dense.residual:
        return result
    return result + (linear(vectors, weights["residual.weight"]) if "residual.weight" in weights else vectors)
