"""The tokens with which all prompts of a batch begin, such as a long system prompt: the model reads them once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig

SHORTEST = 32
"""Number of tokens from which sharing pays."""
READ_POSITIONS = frozenset(
    (
        *(
            "bloom",
            "codegen",
            "cohere",
            "falcon",
            "gemma",
            "gpt2",
            "gpt_bigcode",
            "gpt_neox",
            "gptj",
            "granite",
        ),
        *("llama", "mistral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "smollm3", "stablelm"),
    )
)
"""Model types whose positions come from `position_ids` or the attention mask, so that padding between tokens has no effect."""
FULL = "full_attention"
FIXED = frozenset(("default", "linear", "llama3", "yarn"))
"""Kinds of rotary positions that do not depend on how long the text is."""
LOOK_BACK = ("no_repeat_ngram_size", "stop_strings", "bad_words_ids", "sequence_bias")
"""Options that look for several tokens, maybe across the end of the shared ones."""
PREFIX = "prefix"
"""The number of tokens that all rows of a batch begin with, an int; absent if they are not shared."""


def can_share(config: PretrainedConfig, decoding: GenerationConfig) -> bool:
    """Whether a model may read the beginning of its prompts once, so that the texts stay the same up to rounding.

    Sliding windows would count the padding between prefix and rest, and some rotary positions depend on the length of the whole
    text. Beams move rows.
    """
    if config.model_type not in READ_POSITIONS or getattr(config, "auto_map", None):  # code of its own
        return False
    kinds = {*(getattr(config, "layer_types", None) or [FULL])}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kinds != {FULL} or window or rotary not in FIXED:
        return False
    return (decoding.num_beams or 1) == 1 and not any(getattr(decoding, name) for name in LOOK_BACK)


def share(batch: dict[str, Any]) -> dict[str, Any]:
    """Moves the tokens that all prompts begin with to the front, before the padding, if there are enough.

    :param batch: `input_ids` and `attention_mask`, int64 [batch, width], padded on the left; others are kept.
    :returns: the batch, with PREFIX if the tokens are shared. At least one token of each row is not.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = mask.sum(axis=1)
    most = int(lengths.min()) - 1
    if len(ids) < 2 or most < SHORTEST:
        return batch
    rows, width = ids.shape
    first = (width - lengths)[:, None]
    begin = np.take_along_axis(ids, first + np.arange(most)[None, :], axis=1)
    same = (begin == begin[0]).all(axis=0)
    shared = most if same.all() else int(same.argmin())
    if shared < SHORTEST:
        return batch
    rest = ids[:, shared:].copy()
    inside = np.arange(width - shared)[None, :] >= first
    rest[~inside] = ids[~mask.astype(bool)][0] if (first > 0).any() else 0
    return {
        **batch,
        "input_ids": np.concatenate([np.broadcast_to(begin[0, :shared], (rows, shared)), rest], axis=1),
        "attention_mask": np.concatenate(
            [np.ones((rows, shared), np.int64), inside.astype(np.int64)], axis=1
        ),
        PREFIX: shared,
    }


def read_prefix(model: Any, input_ids: torch.Tensor, shared: int) -> dict[str, Any]:
    """Runs the model over the shared tokens once. Called under inference_mode.

    :param input_ids: int64 [texts, width], each beginning with the shared tokens.
    :returns: what `generate` gets besides: the key-value cache, for all texts.
    """
    cache = model(input_ids=input_ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(input_ids))
    return {"past_key_values": cache}
