"""Whether what a model computes is finite, where tokens or masks are chosen by numbers that nobody sees.

Of NaN, the most probable token is token 0, and no mask is above a threshold: wrong answers without a word. Knows
nothing of tasks.
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
    """What is known of a model's outputs so far; each look is one reduction on the device, and no wait for it."""

    def __init__(self) -> None:
        self._fine: torch.Tensor | None = None

    def look(self, output: Any, logits_alone: bool = False) -> None:
        """Takes in what a model or a layer returned: a tensor, logits, or where there are none every tensor of numbers.

        :param logits_alone: go by nothing but logits.
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
        """Whether nothing was NaN or infinite. Minus infinity counts only where there is nothing else: it rules out."""
        return self._fine is None or bool(self._fine)


_SEEN: ContextVar[Seen | None] = ContextVar("seen", default=None)
_WATCHED: WeakSet[torch.nn.Module] = WeakSet()
_PREPARING = Lock()


@contextmanager
def watched(model: torch.nn.Module, layers: tuple[type[torch.nn.Module], ...] = ()) -> Iterator[Seen]:
    """Looks at all that a model returns within, in this thread: batches may run beside each other.

    Of models that it consists of, such as the decoder that BLIP writes with, at the logits.

    :param layers: kinds of layers to look at too.
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
    """Whether no tensor within holds NaN or infinity; minus infinity beside other numbers rules out, and may stand."""
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() and value.numel()) or bool(value.amax().isfinite())
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list | tuple) else True
