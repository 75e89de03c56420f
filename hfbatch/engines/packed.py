"""Packed batches: the rows of a batch follow each other as one sequence, without padding, and attention stays within a row.

The base model alone is packed. What it returns gets its padding back, so that poolings, heads and tasks stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface

NAME = "hfbatch_packed"
"""Name of the attention function; transformers makes no mask for a name that it does not know."""


@dataclass(frozen=True)
class Packing:
    """Where the rows of a packed batch are."""

    index: torch.Tensor
    """Places of the tokens in the padded batch, int64 [tokens]."""
    bounds: torch.Tensor
    """Start of each row, and the end of the last: int32 [rows + 1]."""
    lengths: list[int]
    shape: tuple[int, int]
    """Rows and width of the padded batch."""

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> Packing:
        """The packing of padded token ids. :param mask: 1 for a token, 0 for padding; None: there is no padding."""
        rows, width = ids.shape
        if mask is None:
            mask = torch.ones_like(ids)
        lengths = mask.sum(dim=1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(mask.flatten().nonzero()[:, 0], bounds, lengths.tolist(), (rows, width))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the values of the tokens alone: [rows, width] to [1, tokens]."""
        return values.flatten()[self.index][None]

    def unpack(self, value: Any) -> Any:
        """Returns values of tokens with their padding, which is 0: [1, tokens, ...] to [rows, width, ...]."""
        if isinstance(value, tuple | list):
            return type(value)(self.unpack(one) for one in value)
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, len(self.index)):
            return value
        rows, width = self.shape
        padded = value.new_zeros(rows * width, *value.shape[2:]).index_copy_(0, self.index, value[0])
        return padded.view(rows, width, *value.shape[2:])

    def positions(self, first: int) -> torch.Tensor:
        """Returns the position of each token in its row, int64 [1, tokens]. :param first: of a row's first token."""
        starts = self.bounds[:-1].repeat_interleave(self.bounds.diff(), output_size=len(self.index))
        return (torch.arange(len(self.index), device=starts.device) - starts + first)[None]


_now = threading.local()
"""The packing of the batch that the model runs in this thread."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within the rows of a packed batch, as an attention function of transformers.

    :param query: [1, heads, tokens, size]; key and value may have fewer heads.
    :param sliding_window: a token sees those that are less than this many tokens away.
    :raises ValueError: for an option that it does not know, which would change results.
    """
    unknown = {"softcap", "s_aux", "position_bias"} & {
        name for name, given in options.items() if given is not None
    }
    if unknown or attention_mask is not None:
        raise ValueError(f"packed batches cannot attend with {', '.join(sorted(unknown)) or 'a mask'}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    packing: Packing = _now.packing
    run = _attend_on_gpu if query.is_cuda and query.dtype != torch.float32 else _attend_by_row
    return run(query, key, value, packing, scaling, causal, sliding_window), None


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float | None,
    causal: bool, window: int | None,
) -> torch.Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    behind = -1 if window is None else window - 1
    longest = max(packing.lengths)
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    made: Any = varlen_attn(
        q,
        k,
        v,
        packing.bounds,
        packing.bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(behind, 0 if causal else behind),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return made[None]


def _attend_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scaling: float | None,
    causal: bool, window: int | None,
) -> torch.Tensor:  # fmt: skip
    made, fewer = [], key.shape[1] != query.shape[1]
    rows = zip(*(one.split(packing.lengths, dim=2) for one in (query, key, value)), strict=True)
    for length, (q, k, v) in zip(packing.lengths, rows, strict=True):
        banded = window is not None and window <= length
        band = _band(length, window or 0, causal, query.device) if banded else None
        plain = causal and not banded
        made.append(sdpa(q, k, v, attn_mask=band, is_causal=plain, scale=scaling, enable_gqa=fewer))
    return torch.cat(made, dim=2).transpose(1, 2)


def _band(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """Returns which tokens see which, bool [length, length]."""
    places = torch.arange(length, device=device)
    away = places[:, None] - places[None, :]
    return (away >= 0) & (away < window) if causal else away.abs() < window


def pack_batches(model: Any) -> None:
    """Has the base model run its batches packed.

    :param model: a model of one of the PACKED types.
    """
    model.set_attn_implementation(NAME)
    base = model.base_model
    base.forward = _packing(base, base.forward)


def _packing(base: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    first = _first_position(base)
    positions = "position_ids" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def run(
        input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *arguments: Any, **options: Any
    ) -> Any:
        """Runs the model on the tokens of all rows as one."""
        packing = _now.packing = Packing.of(input_ids, attention_mask)
        options = {name: value for name, value in options.items() if value is not None}
        if (types := options.get("token_type_ids")) is not None:
            options["token_type_ids"] = packing.pack(types)
        if positions:
            options["position_ids"] = packing.positions(first)
        made = forward(packing.pack(input_ids), *arguments, **options)
        for name, value in made.items():
            made[name] = packing.unpack(value)
        if made.get("pooler_output") is not None:
            made["pooler_output"] = _pool(base, made["last_hidden_state"])
        return made

    return run


def _pool(base: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Returns what the model's pooler makes of the first token of each row."""
    if hasattr(base, "pooler_activation"):  # ALBERT
        return base.pooler_activation(base.pooler(hidden[:, 0]))
    return base.pooler(hidden)


def _first_position(base: Any) -> int:
    """Returns the position of a row's first token; RoBERTa and its kind count from the one behind padding."""
    embeddings: Any = getattr(base, "embeddings", None)
    counts = hasattr(embeddings, "create_position_ids_from_input_ids")
    return int(embeddings.padding_idx) + 1 if counts else 0


AttentionInterface.register(NAME, attend)
