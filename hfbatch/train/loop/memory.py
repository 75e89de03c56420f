"""Estimates the device memory of a training before it begins. Does not import Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.recipes.base import Recipe

if TYPE_CHECKING:
    import torch

FLOAT = 4
"""Bytes of a weight and of its gradient: both are float32, in any precision of the forward pass."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}
"""Bytes of optimizer state per weight; Adafactor keeps only a row and a column of each matrix."""


def held(
    spec: FinetuneSpec, weights: int, trainable: int, activations: int | None, workers: int
) -> dict[str, Any]:
    """Returns the bytes for each purpose, and their `total`.

    :param weights: number of weights; :param trainable: number of trainable ones.
    :param activations: bytes of one forward pass; None if unknown, which makes `total` None.
    :param workers: number of processes, which share the model with fsdp.
    """
    sharing = workers if spec.workers.strategy == "fsdp" else 1
    base = weights - trainable
    frozen = base * spec.method.bits // 8 if spec.method.name == "qlora" else base * FLOAT
    parts = {
        "weights": (frozen + trainable * FLOAT) // sharing,
        "gradients": trainable * FLOAT // sharing,
        "optimizer": trainable * OPTIMIZER_BYTES[spec.schedule.optimizer] // sharing,
        "activations": activations,
    }
    return {**parts, "total": None if activations is None else sum(part or 0 for part in parts.values())}


def kept_for_backward(model: Any, forward: Callable[[], Any]) -> int:
    """Returns the bytes of the tensors that a forward pass saves for the backward pass, without the model's weights."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in _tensors(model)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage).cdata
        if key not in known:
            kept[key] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # stays alive, with its saved tensors, so that no storage address is reused
    del result
    return sum(kept.values())


def skeleton(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """Returns the model to train on the meta device, without memory for its weights."""
    import torch

    from hfbatch.train.loop.model import build_model

    bare = spec.model_copy(update={"model": spec.model.model_copy(update={"scratch": True})})
    with torch.device("meta"):
        return build_model(bare, recipe)


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
