"""Sharded models (FSDP2): selects the layers to shard, and adapts Accelerate.

Each process keeps its shard of every weight. A layer is gathered only for its own forward and backward pass, all
weights outside of these layers for the whole step. See torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch


def layers_to_share(model: Any) -> list[str]:
    """Returns the class names of the layers that are sharded as groups of their own.

    These are the classes that transformers does not split over devices; if the model names none, those of its longest
    ModuleList. Excludes layers that share weights with other modules, which torch refuses in two groups.
    """
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    whole = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in whole]
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = layers or list(max(lists, key=len, default=()))
    tied = {type(layer) for layer in layers if any(uses[id(weight)] > 1 for weight in layer.parameters())}
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in tied})


def keep_precise(plugin: Any) -> None:
    """Changes Accelerate's plugin to reduce gradients in float32 and to keep the dtype of the model's outputs."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def embeddings_with_the_rest(model: Any) -> Iterator[None]:
    """Makes Accelerate shard the embeddings with the weights outside of layers; marks the model as sharded on exit.

    Accelerate 1.15 makes separate groups of the results of `get_input_embeddings` and `get_output_embeddings`, and
    fails if these have weights in another group (BERT, ViT, T5), or the model has none (wav2vec 2.0).
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
    for module in model.modules():
        # Else processes would skip different layers (LayerDrop) and stop generating at different steps.
        module._is_fsdp_managed_module = True
        if getattr(module, "layerdrop", None):
            module.layerdrop = 0.0  # M2M100 and others ignore the mark


@contextmanager
def states_may_lack() -> Iterator[None]:
    """Makes Accelerate accept an optimizer without state for weights that never had a gradient."""
    from accelerate.utils import fsdp_utils

    options = fsdp_utils._prepare_sd_options
    fsdp_utils._prepare_sd_options = lambda plugin: replace(options(plugin), strict=False)
    try:
        yield
    finally:
        fsdp_utils._prepare_sd_options = options
