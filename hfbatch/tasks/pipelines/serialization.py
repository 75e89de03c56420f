"""Serializes the values between steps of a transformers pipeline, to send them between processes. No pickle.

The structure is stored as JSON, followed by the tensors in one safetensors block.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

HEAD = struct.Struct("<Q")
TENSOR, TUPLE = "__tensor__", "__tuple__"


class Bag(dict[Any, Any]):
    """A mapping with access by attribute and by index, like the outputs of transformers' models."""

    def __getattr__(self, name: str) -> Any:
        """Returns a value by its key. :raises AttributeError: if there is none."""
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int) -> Any:
        """Returns a value by its key, or by its index."""
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def dump(value: Any) -> bytes:
    """Serializes nested mappings, lists, tuples, plain values and tensors to bytes.

    Tensors are moved to the CPU; floating-point ones of less than 32 bits are converted to float32.

    :raises TypeError: for anything else.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        """Replaces each tensor with a placeholder."""
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu()
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor = tensor.float()
            tensors[str(len(tensors))] = tensor.contiguous().clone()
            return {TENSOR: str(len(tensors) - 1)}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {str(key): plain(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return {TUPLE: [plain(one) for one in value]}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(f"a {type(value).__name__} cannot be sent between processes")

    nesting = json.dumps(plain(value)).encode()
    return HEAD.pack(len(nesting)) + nesting + save(tensors)


def load(data: bytes | memoryview, mapping: Callable[[dict[str, Any]], Any] = Bag) -> Any:
    """The reverse of `dump`; arrays become tensors.

    :param mapping: constructor of returned mappings.
    """
    from safetensors.torch import load as load_tensors

    data = bytes(data)
    (size,) = HEAD.unpack_from(data)
    tensors = load_tensors(data[HEAD.size + size :])

    def whole(value: Any) -> Any:
        """Restores the tensors of a value."""
        if isinstance(value, dict):
            if TENSOR in value:
                return tensors[value[TENSOR]]
            if TUPLE in value:
                return tuple(whole(one) for one in value[TUPLE])
            return mapping({key: whole(one) for key, one in value.items()})
        return [whole(one) for one in value] if isinstance(value, list) else value

    return whole(json.loads(data[HEAD.size : HEAD.size + size]))
