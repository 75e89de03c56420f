"""Runs model heads at selected positions: for language models, since the head over every token costs as much as the
whole encoder; for causal classifiers, since they search for a row's last token by id.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from hfbatch.tasks.tokens import run_text

if TYPE_CHECKING:
    import torch


@dataclass
class _Wanted:
    """The positions wanted from one model call; concurrent batches have separate contexts."""

    rows: torch.Tensor
    positions: torch.Tensor
    narrowed: bool = False


_WANTED: ContextVar[_Wanted | None] = ContextVar("wanted", default=None)
_LAST: ContextVar[Any] = ContextVar("last", default=None)
CLASSIFIERS = ("score", "classifier")
"""Names in transformers of a causal classifier's layer that computes logits for every token."""
_PREPARING = Lock()


def narrow_head(model: Any) -> None:
    """Enables a cheap `logits_at` on this model; call once. Other calls of the model are unchanged.

    Exported graphs have no head of their own: they compute the logits of all tokens.
    """
    head_of = getattr(model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    if head is not None:
        head.register_forward_pre_hook(_narrow)


def _narrow(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Selects the wanted positions from hidden states [batch, tokens, size]."""
    wanted = _WANTED.get()
    if wanted is None or wanted.narrowed or inputs[0].ndim != 3:
        return None
    wanted.narrowed = True
    return (inputs[0][wanted.rows, wanted.positions], *inputs[1:])


def logits_at(model: Any, batch: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Returns the logits at given positions of each row: [batch, n, vocabulary].

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


def logits_of_last(model: Any, batch: dict[str, torch.Tensor], pad_id: int) -> torch.Tensor:
    """Returns the logits of a classifier, [batch, labels]; of a causal one, at each row's last token by the mask.

    For models whose config has no padding id, which would read the last position of the padded batch.

    :param batch: includes `attention_mask`, int64 [batch, tokens], if a row has padding.
    :param pad_id: the padding id of the batch; models without one in their config refuse batches.
    """
    import torch

    with _PREPARING:
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) != pad_id:
            config.pad_token_id = pad_id
            for head in (getattr(model, name, None) for name in CLASSIFIERS):
                if isinstance(head, torch.nn.Module):
                    head.register_forward_hook(_spread)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    shown = torch.ones_like(ids) if mask is None else mask
    token = _LAST.set((shown * torch.arange(ids.shape[1], device=ids.device)).argmax(1))
    try:
        return run_text(model, batch).logits
    finally:
        _LAST.reset(token)


def _spread(head: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    """Copies the logits of each row's last token to all positions, so that the model reads them at any position.

    :param output: [batch, tokens, labels]; any other output is not a causal classifier's and is returned unchanged.
    """
    import torch

    last = _LAST.get()
    if last is None or not isinstance(output, torch.Tensor) or output.ndim != 3:
        return None
    rows = torch.arange(len(output), device=output.device)
    return output[rows, last][:, None].expand_as(output)
