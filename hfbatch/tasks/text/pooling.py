"""Pools token vectors into one vector, and applies the Dense layers that may follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfbatch.hub.weights import weight_files
from hfbatch.tasks.text.sentence_files import Dense, Normalize

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


class DenseLayers:
    """The Dense modules of a model, whose weights are loaded when they are first used on a device."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._weights: dict[str, dict[str, torch.Tensor]] = {}

    def apply(self, steps: Sequence[Normalize | Dense], vectors: torch.Tensor) -> torch.Tensor:
        """Applies modules to vectors in order: float32 [..., size]."""
        from torch.nn.functional import normalize

        for step in steps:
            vectors = self._dense(step, vectors) if isinstance(step, Dense) else normalize(vectors, dim=-1)
        return vectors

    def _dense(self, dense: Dense, vectors: torch.Tensor) -> torch.Tensor:
        key = f"{dense.folder}@{vectors.device}"
        if key not in self._weights:
            weights = load_dense(self.folder, dense)
            self._weights[key] = {name: tensor.to(vectors.device) for name, tensor in weights.items()}
        return apply_dense(dense, self._weights[key], vectors)


def load_dense(folder: Path, dense: Dense) -> dict[str, torch.Tensor]:
    """Loads the tensors of a Dense module of sentence-transformers, float32, from its safetensors file.

    A module without a folder of its own is among the weights of the model.

    :raises ValueError: if the file does not match the config.
    """
    own = [f"{dense.folder}/model.safetensors"] if dense.folder else weight_files(folder)
    weights = {name: tensor for file in own for name, tensor in _linear(folder / file)}
    needed = ["linear.weight"] + ["residual.weight"] * (
        dense.residual and dense.in_features != dense.out_features
    )
    for name in needed:
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != (dense.out_features, dense.in_features):
            raise ValueError(
                f"{folder / own[0]}: {name} is {shape}, expected {(dense.out_features, dense.in_features)}"
            )
    return weights


def _linear(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a linear layer in a safetensors file, which may hold others."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in {"linear.weight", "linear.bias", "residual.weight"} & set(file.keys()):
            yield name, file.get_tensor(name).float()


def apply_dense(dense: Dense, weights: Mapping[str, torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """Applies a Dense layer: float32 [..., in_features] to float32 [..., out_features]."""
    from torch import nn
    from torch.nn.functional import linear

    activation = getattr(nn, dense.activation)()
    result = activation(linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
    if not dense.residual:
        return result
    return result + (linear(vectors, weights["residual.weight"]) if "residual.weight" in weights else vectors)
