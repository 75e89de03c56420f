"""The tokens with which all prompts of a batch begin, such as a long system prompt: the model reads them once."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig

SHORTEST = 32
"""Number of tokens from which sharing pays."""
LONG = 256
"""Number of tokens that pay for a batch that is not full: the model reads them faster than it generates twenty."""
LONGEST = 4096
"""Number of tokens by which prompts are grouped."""
FACTORS = np.random.default_rng(0).integers(0, 2**63, LONGEST, np.uint64) * 2 + 1
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


def group_prompts(prompts: pa.ListArray, size: int) -> np.ndarray:
    """Returns a group of each prompt, int64 [rows]: 0, or one of prompts that begin alike.

    The prompts of a group agree in at least SHORTEST tokens, and in twice as many up to LONGEST while enough prompts do. A group
    fills whole batches, or quarters of one if its prompts agree in LONG tokens, which are worth more than a full batch.

    :param prompts: lists of token ids.
    :param size: prompts in a batch.
    """
    offsets, ids = prompts.offsets.to_numpy().astype(np.int64), prompts.values.to_numpy()
    lengths, few = np.diff(offsets), max(size // 4, 2)
    groups, found = np.zeros(len(lengths), np.int64), count(1)

    def divide(rows: np.ndarray, width: int) -> np.ndarray:
        """Gives groups to the rows, which agree in their first width / 2 tokens; returns those that are left."""
        if len(rows) < few or width > LONGEST:
            return rows
        longer = rows[lengths[rows] > width]
        new = np.arange(0 if width == SHORTEST else width // 2, width)
        # Sums that are equal by chance cost speed alone: `share` compares the tokens.
        sums = ids[offsets[longer, None] + new].astype(np.uint64) @ FACTORS[new]
        _, kinds, counts = np.unique(sums, return_inverse=True, return_counts=True)
        left = [rows[lengths[rows] <= width], longer[counts[kinds] < few]]
        unit = few if width >= LONG else size
        for kind in np.flatnonzero(counts >= few):
            alike = divide(longer[kinds == kind], 2 * width)
            alike = alike[np.argsort(-lengths[alike], kind="stable")]
            whole = len(alike) // unit * unit
            if whole:
                groups[alike[:whole]] = next(found)
            left.append(alike[whole:])
        return np.concatenate(left)

    divide(np.arange(len(lengths)), SHORTEST)
    return groups


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
