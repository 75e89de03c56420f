"""Sampling of tokens that depends only on a row's position in the input.

`argmax(logits + Gumbel noise)` is an exact draw from `softmax(logits)` (Gumbel, 1954; Maddison, Tarlow and
Minka, "A* Sampling", 2014). The noise of a token is a hash of (row seed, step, token id), so that rows share
no random state: results do not depend on batches, their order, retries or workers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

if TYPE_CHECKING:
    from transformers import GenerationConfig


def _signed(value: int) -> int:
    """Returns the int64 with the same bits as an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
LARGEST_UNIFORM = 1 - 2**-24
"""The largest float32 below one."""


def splitmix64(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Returns number `counter` of the SplitMix64 stream that starts at key (Steele, Lea and Flood, 2014).

    :param key: int64.
    :param counter: int64, of a shape that broadcasts with key's.
    :returns: int64 with 64 well-mixed bits, the same on every device.
    """
    bits = key + (counter + 1) * GAMMA
    bits = (bits ^ _shift_right(bits, 30)) * MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * MIX_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Logical right shift, which fills with zeros; torch's shift copies the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Returns standard Gumbel noise, float32 and finite, from int64 bits.

    `-log(-log(1 - v))` with a small v keeps full precision in the upper tail, which decides the draws.
    """
    uniform = (_shift_right(bits, 1) | 1).to(torch.float32).mul_(2.0**-63).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def row_seeds(seed: int, places: pa.Table) -> np.ndarray:
    """Returns a seed for each row, int64 [rows], from the job's seed and the row's position.

    :param places: `file` (string) and `row` (int64) of each row.
    """
    files = places["file"].combine_chunks().dictionary_encode()
    digests = [
        hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        for name in files.dictionary.to_pylist()
    ]
    keys = np.frombuffer(b"".join(digests), "<i8")[files.indices.to_numpy()]
    rows = places["row"].to_numpy().astype(np.int64)
    return splitmix64(torch.from_numpy(keys), torch.from_numpy(rows)).numpy()


class GumbelNoise:
    """A logits processor that makes greedy decoding sample; must come after all warpers.

    :param seeds: int64 [sequences].
    :param prompt_width: number of tokens in the padded prompts, so that the first new token is step 0.
    """

    def __init__(self, seeds: torch.Tensor, prompt_width: int) -> None:
        self._seeds = seeds
        self._prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Adds noise to scores, float [sequences, vocabulary]."""
        step = torch.full((1,), input_ids.shape[1] - self._prompt_width, device=scores.device)
        keys = splitmix64(self._seeds, step)
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        return gumbel(splitmix64(keys[:, None], tokens[None, :])).add_(scores)


def warpers(config: GenerationConfig, device: torch.device) -> list[Any]:
    """Returns the logits warpers for sampling with this config, in the order of `generate`.

    `generate` builds them only for its own sampling, which draws from a random state that a batch shares.
    """
    from transformers import generation

    found: list[Any] = []
    if config.temperature is not None and config.temperature != 1:
        found.append(generation.TemperatureLogitsWarper(float(config.temperature)))
    if config.top_h is not None:
        found.append(generation.TopHLogitsWarper(config.top_h))
    if config.top_k:
        found.append(generation.TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        found.append(generation.TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        found.append(generation.MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        found.append(generation.TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        found.append(generation.EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        found.append(generation.EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    return found
