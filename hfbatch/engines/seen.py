"""Accumulates whether the outputs of a model are finite, where tokens are chosen by values that are not returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
