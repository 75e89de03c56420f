"""What a training holds on a device, estimated before it begins. Knows nothing of Ray and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfbatch.finetune_spec import FinetuneSpec
from hfbatch.train.recipes.base import Recipe

if TYPE_CHECKING:
    import torch

FLOAT = 4
"""Bytes of a weight and of its gradient: both are float32, whatever the forward pass computes in."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "adafactor": 0}
"""Bytes of the optimizer's state for a weight; Adafactor keeps but a row and a column of each matrix."""


def held(
    spec: FinetuneSpec, weights: int, trainable: int, activations: int | None, workers: int
) -> dict[str, Any]:
    """Bytes by what they are for, and their `total`.

    :param weights: how many there are; :param trainable: how many of them training changes.
    :param activations: bytes of one forward pass; None where they are not known, which leaves `total` None.
    :param workers: processes, which may share the model.
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
    """Bytes of the tensors that a forward pass keeps for the backward pass, beside the model's weights."""
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
        result = forward()  # alive until the end, and with it what it keeps: a storage's number is its own
    del result
    return sum(kept.values())


def skeleton(spec: FinetuneSpec, recipe: Recipe) -> Any:
    """The model to train without its weights: it has shapes and no memory."""
    import torch

    from hfbatch.train.model import build_model

    bare = spec.model_copy(update={"model": spec.model.model_copy(update={"scratch": True})})
    with torch.device("meta"):
        return build_model(bare, recipe)


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
