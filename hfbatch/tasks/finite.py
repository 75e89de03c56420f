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

from hfbatch.engines.seen import Seen

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
