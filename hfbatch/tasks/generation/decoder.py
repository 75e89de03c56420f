"""Runs `generate` on a batch so that each row gets the same result as alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfbatch.engines.log_probs import log_probs_of
from hfbatch.tasks.base import FINITE
from hfbatch.tasks.generation.prefix import PREFIX, read_prefix
from hfbatch.tasks.generation.sampling import GumbelNoise, splitmix64, warpers

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import GenerationConfig, LogitsProcessorList, StopStringCriteria

    from hfbatch.tasks.generation.constraint import Grammar

PAST_VOCABULARY = 2**31
"""A token id that no model has; represents padding."""
NEVER = 2**31
"""A step beyond the length of any text."""


@dataclass(frozen=True)
class Decoder:
    """Decodes a batch.

    :param config: from `generation_config.resolve`.
    :param count: number of texts per row.
    :param begin: tokens that every text begins with.
    :param stop: finds stop strings; None to stop at eos tokens only.
    :param log_probs: whether to return the log-probability of each new token.
    :param constraint: what texts must be; not for beam search.
    """

    config: GenerationConfig
    count: int = 1
    begin: tuple[int, ...] = ()
    stop: StopStringCriteria | None = None
    log_probs: bool = False
    constraint: Grammar | None = None

    def __call__(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        limit: int | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Continues each row until an eos token, a stop string or the maximum number of tokens.

        :param batch: inputs of `generate`: `input_ids` and `attention_mask`, int64 [batch, width], padded on
            the left for decoder-only models; when sampling, also `seed`, int64 [batch]; see also `prefix.share`.
        :param limit: stops after this many new tokens in any case.
        :param on_tokens: called after each step with the new token of each text, also of those that have ended.
        :returns: see `join_texts`; with a constraint also `complete`, bool [batch, count], which texts satisfy it.
        """
        inputs = dict(batch)
        seeds, shared = inputs.pop("seed", None), inputs.pop(PREFIX, 0)
        if seeds is not None:
            # Each text is a separate row: generate rejects num_return_sequences when it does not sample itself.
            inputs = {name: tensor.repeat_interleave(self.count, dim=0) for name, tensor in inputs.items()}
        config = self._config(limit)
        width = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        padded = None if model.config.is_encoder_decoder else inputs.get("attention_mask")
        finite = FiniteScores(width)
        allowed = AllowedTokens(self.constraint, width) if self.constraint else None
        processors = self._processors(seeds, width, padded, [finite, *([allowed] if allowed else [])])
        if padded is not None:
            config.no_repeat_ngram_size = None
        # generate fills unset options from the model's config, which would restore options that are not followed.
        model.generation_config = config
        if shared:
            inputs |= read_prefix(model, inputs["input_ids"], int(shared))
        made = model.generate(
            **inputs,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=[
                *([self.stop] if self.stop else []),
                *([_Steps(on_tokens)] if on_tokens else []),
            ],
        )
        joined = self.join_texts(model, batch, made, width)
        if allowed:
            joined["complete"] = allowed.complete(made).reshape(-1, self.count)
        return {**joined, FINITE: finite.until(joined["lengths"])}

    def _config(self, limit: int | None) -> GenerationConfig:
        """Returns the config for `generate`: greedy even when sampling, which noise and warpers do as processors."""
        config = deepcopy(self.config)
        config.stop_strings = None
        if config.do_sample:
            for name in ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p"):
                setattr(config, name, None)
            config.do_sample, config.epsilon_cutoff, config.eta_cutoff = False, None, None
        else:
            config.num_return_sequences = self.count
        if limit is not None:
            most = config.max_new_tokens or (config.max_length or limit + 1) - 1
            config.max_length, config.max_new_tokens = None, max(min(most, limit), 1)
            config.min_length, config.min_new_tokens = None, None
        return config

    def _processors(
        self, seeds: torch.Tensor | None, width: int, mask: torch.Tensor | None, first: list[Any]
    ) -> LogitsProcessorList:
        """Returns processors for what `generate` does not do, or not correctly with padding, or not reproducibly.

        :param mask: the attention mask, if new tokens follow padded prompts.
        :param first: the processors before warpers and noise.
        """
        from transformers import LogitsProcessorList

        found = list(first)
        size = self.config.no_repeat_ngram_size
        if size and mask is not None:
            found.append(NoRepeatBehindPadding(size, mask, self.config.num_beams or 1))
        if self.begin:
            found.append(BeginWith(self.begin, width))
        if seeds is not None:
            sequence = torch.arange(self.count, device=seeds.device)
            each = splitmix64(seeds[:, None], sequence[None, :]).flatten()
            found += [*warpers(self.config, seeds.device), GumbelNoise(each, width)]
        return LogitsProcessorList(found)

    def join_texts(
        self, model: Any, batch: dict[str, torch.Tensor], made: torch.Tensor, width: int
    ) -> dict[str, torch.Tensor]:
        """Truncates each text at its end and joins the texts of a row.

        :param made: prompt and new tokens of each text, int64 [batch * count, width + new].
        :param width: number of tokens in the padded prompt, or in the decoder's start.
        :returns: `tokens`, int32 [batch, count * new], the new tokens of a row's texts one after another,
            then padding; `lengths`, int64 [batch, count], tokens of each; `length`, int64 [batch], their
            sum; `stopped`, bool [batch, count], whether the text reached its end; `prompt`, int64 [batch], prompt
            tokens; if requested, `log_probs`, float32 like `tokens`. `__call__` adds `FINITE`.
        """
        inside, stopped = self._ends(made, width)
        new = made[:, width:]
        lengths = inside.sum(dim=1).reshape(-1, self.count)
        joined = {"tokens": new.to(torch.int32)}
        if self.log_probs:
            joined["log_probs"] = log_probs(model, batch, made, width, lengths)
        order = inside.reshape(len(lengths), -1).int().argsort(dim=1, descending=True, stable=True)
        joined = {name: part.reshape(len(lengths), -1).gather(1, order) for name, part in joined.items()}
        mask = batch.get("attention_mask")
        read = mask.sum(dim=1) if mask is not None else torch.zeros_like(lengths[:, 0])
        return {
            **joined,
            "lengths": lengths,
            "length": lengths.sum(dim=1),
            "stopped": stopped.reshape(-1, self.count),
            "prompt": read,
        }

    def _ends(self, made: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns which new tokens belong to a text, bool [texts, new], and which texts ended, bool [texts]."""
        new, eos = made[:, width:], self.config.eos_token_id
        ends = torch.zeros_like(new, dtype=torch.bool)
        if eos is not None:
            ends = torch.isin(new, torch.tensor(eos, device=new.device).reshape(-1))
        if self.stop is not None:
            found = [self.stop(made[:, : width + step + 1], None) for step in range(new.shape[1])]
            ends = ends | torch.stack(found, dim=1)
        return ends.cumsum(dim=1) - ends.int() == 0, ends.any(dim=1)


class _Steps:
    """A stopping criterion that never stops, and reports the new tokens of each step."""

    def __init__(self, on_tokens: Callable[[list[int]], None]) -> None:
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Returns false for each text, bool [texts]."""
        self._on_tokens(input_ids[:, -1].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class FiniteScores:
    """A logits processor that records the first step at which a sequence's best score is not finite.

    With NaN scores, argmax silently returns token 0. Masked tokens have a score of minus infinity.

    :param width: number of tokens in the padded prompt, so that the first new token is step 0.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._first: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores unchanged, float [sequences, vocabulary]."""
        step = input_ids.shape[1] - self._width
        found = torch.where(scores.amax(dim=-1).isfinite(), NEVER, step)
        self._first = found if self._first is None else torch.minimum(self._first, found)
        return scores

    def until(self, lengths: torch.Tensor) -> torch.Tensor:
        """Returns which rows had finite scores until their texts ended, bool [batch].

        :param lengths: number of new tokens in each text of a row, int64 [batch, count].
        """
        if self._first is None:
            return torch.ones_like(lengths[:, 0], dtype=torch.bool)
        first = self._first.reshape(len(lengths), -1).amin(dim=1)
        return first >= lengths.amax(dim=1)


class BeginWith:
    """A logits processor that forces the given tokens at the first steps.

    :param width: number of tokens in the padded prompt, so that the first new token is step 0.
    """

    def __init__(self, tokens: tuple[int, ...], width: int) -> None:
        self._tokens, self._width = tokens, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masks all tokens but the forced one, even if it was masked before: float [sequences, vocabulary]."""
        step = input_ids.shape[1] - self._width
        if step >= len(self._tokens):
            return scores
        token = self._tokens[step]
        only = torch.full_like(scores, -torch.inf)
        only[:, token] = scores[:, token].nan_to_num(neginf=0.0)
        return only


class AllowedTokens:
    """A logits processor that masks the tokens with which a text would leave its constraint, or end too early.

    :param width: number of tokens in the padded prompt, so that the first new token is step 0.
    """

    def __init__(self, grammar: Grammar, width: int) -> None:
        from hfbatch.engines.masks import TokenMask

        self._grammar, self._read = grammar, width
        self._matchers: list[LLMatcher] = []
        self._mask = TokenMask(grammar.vocabulary)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masks tokens, also ids beyond the tokenizer's: float [texts, vocabulary]."""
        self._consume(input_ids)
        return self._mask.apply(self._matchers, scores)

    def complete(self, made: torch.Tensor) -> torch.Tensor:
        """Returns which texts satisfy the constraint, bool [texts].

        :param made: prompt and new tokens of each text, int64 [texts, width + new].
        """
        self._consume(made)
        complete = [matcher.is_accepting() and not matcher.is_error() for matcher in self._matchers]
        return torch.tensor(complete, device=made.device)

    def _consume(self, input_ids: torch.Tensor) -> None:
        """Reads the tokens since the last step; after its end, a text goes on with padding."""
        from hfbatch.engines.masks import read

        self._matchers = self._matchers or [self._grammar.start.deep_copy() for _ in range(len(input_ids))]
        new, self._read = input_ids[:, self._read :].tolist(), input_ids.shape[1]
        for matcher, tokens in zip(self._matchers, new, strict=True):
            read(matcher, tokens)


class NoRepeatBehindPadding:
    """A logits processor that prevents repeated n-grams, and ignores padding.

    :param mask: int64 [sequences, width], the prompts' attention mask.
    :param beams: number of beams per sequence.
    """

    def __init__(self, size: int, mask: torch.Tensor, beams: int) -> None:
        from transformers import NoRepeatNGramLogitsProcessor

        self._rule = NoRepeatNGramLogitsProcessor(size)
        self._padding = mask.repeat_interleave(beams, dim=0) == 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Masks the tokens that would repeat an n-gram: float [sequences, vocabulary]."""
        ids = input_ids.clone()
        ids[:, : self._padding.shape[1]].masked_fill_(self._padding, PAST_VOCABULARY)
        return self._rule(ids, scores)


def log_probs(
    model: Any, batch: dict[str, torch.Tensor], made: torch.Tensor, width: int, lengths: torch.Tensor
) -> torch.Tensor:
    """Returns the model's log-probability of each new token, float32 [texts, new], 0 after a text's end.

    Each text runs through the model once more, alone and without padding: the scores of `generate` are modified by
    its processors, and for all steps and rows together they take more memory than the model.

    :param made: prompt and new tokens, int64 [texts, width + new].
    :param lengths: number of new tokens to score in each text, int64 [batch, count].
    """
    found = torch.zeros(made[:, width:].shape, dtype=torch.float32, device=made.device)
    count = lengths.shape[1]
    for text, length in enumerate(lengths.flatten().tolist()):
        row = text // count
        inputs = {
            name: tensor[row : row + 1] for name, tensor in batch.items() if name not in ("seed", PREFIX)
        }
        if "attention_mask" in inputs:
            real = inputs.pop("attention_mask")[0].bool()
            inputs["input_ids"] = inputs["input_ids"][:, real]
        new = made[text : text + 1, width : width + length]
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = made[text : text + 1, : width + length - 1]
        else:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new[:, :-1]], dim=1)
        found[text, :length] = log_probs_of(model, inputs, new)
    return found
