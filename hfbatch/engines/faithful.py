"""Whether another form of a model, such as a graph, gives what the model gives: the inputs to try, and the difference."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

MOST_TOKENS = 512
"""Longest rows on which the two are compared."""


def kind_of_call(
    takes: Collection[str], inputs: Mapping[str, Any]
) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """Returns a name for calls with such inputs, which another form of a model is made for, their tensors and their other values.

    Batches of texts with padding and without are of one kind: those without get an attention mask.

    :param takes: the names of what `forward` takes.
    """
    options = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    tensors = {name: value for name, value in inputs.items() if name not in options}
    if "input_ids" in tensors and "attention_mask" in takes and "attention_mask" not in inputs:
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    return repr((sorted(tensors), sorted(options.items()))), tensors, options


def other_shapes(
    sample: Mapping[str, torch.Tensor], positions: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields inputs of other shapes: one row more; for texts, of half the tokens and of many, one row padded.

    :param positions: the model's number of position embeddings, if it has any.
    """
    rows = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in sample.items()}
    if "input_ids" not in sample:
        yield rows
        return
    width = sample["input_ids"].shape[1]
    most = max(min(positions or MOST_TOKENS, MOST_TOKENS) - 4, width)  # some models begin to count at 2
    for wanted in (-(-width // 2), most):
        columns = torch.arange(wanted) % width
        varied = {
            name: tensor[:, columns] if tensor.shape[1:] == (width,) else tensor
            for name, tensor in rows.items()
        }
        if "attention_mask" in varied:
            varied["attention_mask"][0, -(-wanted // 2) :] = 0
        yield varied


def difference(wanted: Any, found: Any) -> float:
    """Returns the largest difference between the outputs of two models, in parts of the largest value of an output."""
    pairs = zip(_leaves(wanted), _leaves(found), strict=True)
    return torch.stack([(a - b).abs().max() / a.abs().max().clamp(1e-6) for a, b in pairs]).max().item()


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of floats in a model's outputs."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield leaf.float()


@contextmanager
def silenced() -> Iterator[None]:
    """Discards the progress and the warnings of exporters and compilers, which would mix with results on stdout."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
