"""Continuous batching: a row that is done makes room for the next at once, instead of when its batch is done.

The work is transformers' own, over a cache of pages. What it would leave out without a word is refused here.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from hfbatch.errors import HfbatchError
from hfbatch.tasks.parts.finite import Seen

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

ROWS = 32
"""Rows under way at once where the spec leaves it."""
STEP_TOKENS = 512
"""Most tokens that a step computes where the spec leaves it."""
PAGE = 32
"""Tokens of a page of the cache."""
NOT_DONE = (
    *("num_beams", "stop_strings", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty"),
)
"""Options that it drops, ignores or does not know."""
ATTENTIONS = ("full_attention", "sliding_attention")
"""Kinds of layers whose cache has pages."""


class ContinuousError(HfbatchError):
    """A row, or what ran beside it, could not be generated."""


def continuous_faults(
    config: PretrainedConfig, decoding: GenerationConfig, begin_with: str | None
) -> list[str]:
    """What of a model and its options continuous batching cannot do."""
    faults = []
    if decoding.do_sample:
        faults.append(
            "batch.continuous draws from a random state that all rows share, so that a rerun would not repeat "
            "them; set params.do_sample=false or leave batch.continuous out"
        )
    asked = {name: getattr(decoding, name) for name in NOT_DONE}
    asked = {name: value for name, value in asked.items() if value not in (None, 0, 1, False)}
    if begin_with:
        asked["begin_with"] = begin_with
    if asked:
        shown = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        faults.append(
            f"batch.continuous cannot do {shown} (of params or the model's generation_config); "
            "set the option to null, 1 or 0, or leave batch.continuous out"
        )
    kinds = {*(getattr(config.get_text_config(), "layer_types", None) or ())} - {*ATTENTIONS}
    if kinds:
        faults.append(
            f"batch.continuous has no cache for layers of kind {', '.join(sorted(kinds))}; leave it out for this model"
        )
    return faults


def generate_continuously(
    model: Any, batch: dict[str, torch.Tensor], config: GenerationConfig, rows: int, tokens: int | None
) -> tuple[torch.Tensor, bool]:
    """The likeliest continuation of each row.

    The cache holds as many rows as are under way, each as long as the longest may become.

    :param batch: `input_ids` and `attention_mask`, int64 [batch, width], padded on the left.
    :param rows: most rows under way at once.
    :param tokens: most tokens that a step computes, prompts and new ones together.
    :returns: the padded prompts with the new tokens and padding behind them, int64 [batch, width + new]; and whether
        all logits were finite.
    :raises ContinuousError: where a row failed, with its cause.
    """
    from transformers import ContinuousBatchingConfig

    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    rows = min(rows, len(prompts))
    longest = max(map(len, prompts)) + config.max_new_tokens
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=rows * -(-longest // PAGE),
        max_batch_tokens=max(tokens or STEP_TOKENS, rows),
        max_requests_per_batch=rows,
        auto_switch_to_flash=False,  # the attention of generate, and nothing from the Hub
        use_async_batching=False,
        use_cuda_graph=False,
    )
    seen = Seen()
    hook = model.register_forward_hook(lambda model, inputs, output: seen.look(output))
    try:  # the model runs in a thread of transformers' own
        outputs = model.generate_batch(
            prompts, generation_config=deepcopy(config), continuous_batching_config=settings, warmup=False
        )
    finally:
        hook.remove()
    made = _behind(ids, _finished(list(outputs.values()), len(prompts)), config.pad_token_id or 0)
    return made, seen.finite


def _finished(outputs: list[Any], count: int) -> list[list[int]]:
    """New tokens of each row. :raises ContinuousError: unless every row is finished."""
    from transformers.generation.continuous_batching import RequestStatus

    failed = [output for output in outputs if output.status != RequestStatus.FINISHED]
    if failed:
        raise ContinuousError(f"continuous batching failed: {failed[0].error or failed[0].status.name}")
    if len(outputs) != count:
        raise ContinuousError(f"continuous batching ended with {len(outputs)} of {count} rows")
    return [output.generated_tokens for output in outputs]


def _behind(ids: torch.Tensor, new: list[list[int]], pad: int) -> torch.Tensor:
    """Prompts, int64 [batch, width], with the new tokens and padding behind them."""
    width = max(map(len, new))
    padded = [[*tokens, *[pad] * (width - len(tokens))] for tokens in new]
    return torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], dim=1)
