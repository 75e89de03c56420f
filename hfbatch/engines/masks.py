"""Masks the tokens with which texts would leave a constraint, by llguidance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenMask:
    """Masks scores by matchers, those of several texts at the same time.

    :param vocabulary: number of token ids that the matchers know.
    """

    def __init__(self, vocabulary: int) -> None:
        from llguidance import LLExecutor

        self._vocabulary, self._executor = vocabulary, LLExecutor(torch.get_num_threads())

    def apply(self, matchers: Sequence[LLMatcher], scores: torch.Tensor) -> torch.Tensor:
        """Masks tokens, also ids beyond the tokenizer's: float [texts, vocabulary]."""
        from llguidance.numpy import fill_next_token_bitmask_par

        texts, vocabulary = scores.shape
        packed = np.zeros((texts, -(-self._vocabulary // 32)), np.int32)
        places = [(matcher, place) for place, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, places, packed)
        words = torch.from_numpy(packed).to(scores.device)
        bits = words[:, :, None] >> torch.arange(32, device=scores.device, dtype=torch.int32) & 1
        allowed = bits.reshape(texts, -1)[:, :vocabulary].bool()
        beyond = vocabulary - allowed.shape[1]
        return scores.masked_fill(~torch.nn.functional.pad(allowed, (0, beyond)), -torch.inf)


def read(matcher: LLMatcher, tokens: Iterable[int]) -> None:
    """Has a matcher read the next tokens of its text, up to its end."""
    for token in tokens:
        if not matcher.is_stopped():
            matcher.consume_token(token)
