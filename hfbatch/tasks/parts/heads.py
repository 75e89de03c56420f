"""Language-model heads over a few positions: over every token of a text, a head costs as much as the whole encoder."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfbatch.tasks.parts.text import run_text

if TYPE_CHECKING:
    import torch


@dataclass
class _Wanted:
    """What one call of the model is for; batches may run beside each other, each in a context of its own."""

    rows: torch.Tensor
    positions: torch.Tensor
    narrowed: bool = False


_WANTED: ContextVar[_Wanted | None] = ContextVar("wanted", default=None)


def narrow_head(model: Any) -> None:
    """Makes `logits_at` cheap on this model; to be called once. Other calls of the model stay as they are."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_narrow)


def _narrow(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Takes the wanted positions out of hidden states [batch, tokens, size]."""
    wanted = _WANTED.get()
    if wanted is None or wanted.narrowed or inputs[0].ndim != 3:
        return None
    wanted.narrowed = True
    return (inputs[0][wanted.rows, wanted.positions], *inputs[1:])


def logits_at(model: Any, batch: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Logits at some positions of each row: [batch, n, vocabulary].

    :param positions: int64 [batch, n].
    """
    import torch

    rows = torch.arange(len(positions), device=positions.device)[:, None]
    wanted = _Wanted(rows, positions)
    token = _WANTED.set(wanted)
    try:
        logits = run_text(model, batch).logits
    finally:
        _WANTED.reset(token)
    return logits if wanted.narrowed else logits[rows, positions]
