"""Checks that model outputs are finite where tokens or masks are chosen by values that are not returned.

With NaN logits, argmax returns token 0 and no mask exceeds a threshold: results would be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch


class Seen:
    """Accumulates whether model outputs are finite; each check is one reduction on the device, without a sync."""

    def __init__(self) -> None:
        self._fine: torch.Tensor | None = None

    def look(self, output: Any, logits_alone: bool = False) -> None:
        """Checks the output of a model or layer: its logits, or all floating-point tensors if it has none.

        :param logits_alone: check logits only.
        """
        values = output if isinstance(output, Mapping) else {"": output}
        if logits_alone or isinstance(values.get("logits"), torch.Tensor):
            values = {"logits": values.get("logits")}
        for value in values.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                fine = value.detach().amax().isfinite()
                self._fine = fine if self._fine is None else self._fine & fine

    @property
    def finite(self) -> bool:
        """Whether no value was NaN or infinite. Minus infinity, used for masking, is allowed beside finite values."""
        return self._fine is None or bool(self._fine)


_SEEN: ContextVar[Seen | None] = ContextVar("seen", default=None)
_WATCHED: WeakSet[torch.nn.Module] = WeakSet()
_PREPARING = Lock()


@contextmanager
def watched(model: torch.nn.Module, layers: tuple[type[torch.nn.Module], ...] = ()) -> Iterator[Seen]:
    """Checks all outputs of a model inside the context, in this thread only: batches may run concurrently.

    For submodels, such as the text decoder of BLIP, checks the logits.

    :param layers: layer classes to check too.
    """
    from transformers import PreTrainedModel

    with _PREPARING:
        if model not in _WATCHED:
            model.register_forward_hook(_look)
            _WATCHED.add(model)
            for module in list(model.modules())[1:]:
                if isinstance(module, layers):
                    module.register_forward_hook(_look)
                elif isinstance(module, PreTrainedModel):
                    module.register_forward_hook(_look_at_logits)
    seen = Seen()
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def _look(model: Any, inputs: Any, output: Any) -> None:
    seen = _SEEN.get()
    if seen is not None:
        seen.look(output)


def _look_at_logits(model: Any, inputs: Any, output: Any) -> None:
    seen = _SEEN.get()
    if seen is not None:
        seen.look(output, logits_alone=True)


def is_finite(value: Any) -> bool:
    """Whether nested tensors hold neither NaN nor infinity; minus infinity is allowed beside finite values."""
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() and value.numel()) or bool(value.amax().isfinite())
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list | tuple) else True
