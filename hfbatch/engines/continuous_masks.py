"""The mask of a constraint for continuous batching of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from hfbatch.engines.masks import TokenMask, read

if TYPE_CHECKING:
    from llguidance import LLMatcher


class AllowedInTurn(ContinuousBatchingLogitsProcessor):
    """Masks the scores of the texts of each step, which are others from step to step.

    :param grammar: a compiled constraint, with `start` and `vocabulary`.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, grammar: Any) -> None:
        self._start, self._mask = grammar.start, TokenMask(grammar.vocabulary)
        self._texts: dict[str, tuple[LLMatcher, int]] = {}
        self._step: list[LLMatcher] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Sets the argument, which is not read."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Has the matchers of the next step's texts read what has been generated. Called before the step."""
        states = [request.state for request in requests_with_new_token]
        self._step = [self._matcher(state.request_id, state.generated_tokens) for state in states]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Masks the scores of the texts of the step: float [texts or more, vocabulary]."""
        texts = len(self._step)
        return torch.cat([self._mask.apply(self._step, scores[:texts]), scores[texts:]]) if texts else scores

    def is_complete(self, request: str, tokens: list[int]) -> bool:
        """Whether a text that has ended satisfies the constraint."""
        matcher = self._matcher(request, tokens)
        del self._texts[request]
        return matcher.is_accepting() and not matcher.is_error()

    def _matcher(self, request: str, tokens: list[int]) -> LLMatcher:
        matcher, seen = self._texts.get(request) or (self._start.deep_copy(), 0)
        read(matcher, tokens[seen:])
        self._texts[request] = matcher, len(tokens)
        return matcher
