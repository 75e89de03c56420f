"""A model that processes share (FSDP2): which layers are gathered one by one, and what Accelerate has to be told.

Each process keeps its part of every weight; a layer is gathered for its own forward and backward pass alone, all that is
in no such layer for the whole step. See torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch


def layers_to_share(model: Any) -> list[str]:
    """Names of the classes of layers that can be gathered one by one.

    Those that transformers keeps on one device; where the model names none, those of its longest list of modules. Not
    those with weights that other modules use too, such as tied embeddings: torch refuses such weights in two groups.
    """
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    whole = getattr(model, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in whole]
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = layers or list(max(lists, key=len, default=()))
    tied = {type(layer) for layer in layers if any(uses[id(weight)] > 1 for weight in layer.parameters())}
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in tied})


def keep_precise(plugin: Any) -> None:
    """Sums gradients in float32, and leaves what the model returns in its own dtype; of Accelerate's plugin, in place."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextmanager
def embeddings_with_the_rest(model: Any) -> Iterator[None]:
    """Within it, Accelerate leaves a model's embeddings among the weights that are in no layer; afterwards it is shared.

    Accelerate 1.15 makes groups of their own of what `get_input_embeddings` and `get_output_embeddings` return, and
    fails where these have weights in another group (BERT, ViT, T5), or the model has none (wav2vec 2.0).
    """
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
    for module in model.modules():
        # Else each process would skip other layers (LayerDrop) and stop generating at another step, out of turn.
        module._is_fsdp_managed_module = True
        if getattr(module, "layerdrop", None):
            module.layerdrop = 0.0  # M2M100 and others skip layers all the same


@contextmanager
def states_may_lack() -> Iterator[None]:
    """Within it, Accelerate loads an optimizer that has no state for some weights: they never had a gradient."""
    from accelerate.utils import fsdp_utils

    options = fsdp_utils._prepare_sd_options
    fsdp_utils._prepare_sd_options = lambda plugin: replace(options(plugin), strict=False)
    try:
        yield
    finally:
        fsdp_utils._prepare_sd_options = options
