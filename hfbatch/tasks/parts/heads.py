"""Heads over a few positions: of language models, since over every token of a text a head costs as much as the whole
encoder; of causal classifiers, since they look for a row's last token by id.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
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
_LAST: ContextVar[Any] = ContextVar("last", default=None)
CLASSIFIERS = ("score", "classifier")
"""What transformers calls the layer of a causal classifier that gives every token logits."""
_PREPARING = Lock()


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


def logits_of_last(model: Any, batch: dict[str, torch.Tensor], pad_id: int) -> torch.Tensor:
    """Logits of a classifier, [batch, labels]; of a causal one, those of each row's last token by the mask.

    For a model whose config has no padding id: it would read the last token of the batch's width.

    :param batch: with `attention_mask`, int64 [batch, tokens], where a row has padding.
    :param pad_id: what rows are padded with; without a padding id in their config, models refuse batches.
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
    """Puts the logits of each row's last token at all of its tokens, so that the model finds them wherever it looks.

    :param output: [batch, tokens, labels]; anything else is no causal classifier's and stays as it is.
    """
    import torch

    last = _LAST.get()
    if last is None or not isinstance(output, torch.Tensor) or output.ndim != 3:
        return None
    rows = torch.arange(len(output), device=output.device)
    return output[rows, last][:, None].expand_as(output)
