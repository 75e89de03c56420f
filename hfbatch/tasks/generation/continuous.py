"""Continuous batching: a finished row is replaced by the next at once, instead of when the whole batch is finished.

Uses the implementation in transformers, with a paged cache. Options that it would silently ignore are errors here.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from hfbatch.errors import HfbatchError
from hfbatch.tasks.finite import Seen

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

ROWS = 32
"""Default number of concurrent rows."""
STEP_TOKENS = 512
"""Default maximum of tokens in a step."""
PAGE = 32
"""Tokens in a page of the cache."""
NOT_DONE = (
    *("num_beams", "stop_strings", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty"),
)
"""Options that continuous batching drops, ignores or does not support."""
ATTENTIONS = ("full_attention", "sliding_attention")
"""Layer types with a paged cache."""


class ContinuousError(HfbatchError):
    """Generation of a row, or of one that ran concurrently, failed."""


def continuous_faults(
    config: PretrainedConfig, decoding: GenerationConfig, begin_with: str | None
) -> list[str]:
    """Returns errors for models and options that continuous batching does not support."""
    faults = []
    if decoding.do_sample:
        faults.append(
            "batch.continuous samples from a random state shared by all rows, so a rerun would not reproduce "
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
    """Generates the most probable continuation of each row.

    The cache has room for all concurrent rows, each at the maximum length.

    :param batch: `input_ids` and `attention_mask`, int64 [batch, width], padded on the left.
    :param rows: maximum of concurrent rows.
    :param tokens: maximum of tokens in a step, prompts and new tokens together.
    :returns: the padded prompts followed by new tokens and padding, int64 [batch, width + new]; and whether
        all logits were finite.
    :raises ContinuousError: if a row failed, with its cause.
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
        auto_switch_to_flash=False,  # keeps the attention of generate; downloads nothing from the Hub
        use_async_batching=False,
        use_cuda_graph=False,
    )
    seen = Seen()
    hook = model.register_forward_hook(lambda model, inputs, output: seen.look(output))
    try:  # transformers runs the model in another thread
        outputs = model.generate_batch(
            prompts, generation_config=deepcopy(config), continuous_batching_config=settings, warmup=False
        )
    finally:
        hook.remove()
    made = _behind(ids, _finished(list(outputs.values()), len(prompts)), config.pad_token_id or 0)
    return made, seen.finite


def _finished(outputs: list[Any], count: int) -> list[list[int]]:
    """Returns the new tokens of each row. :raises ContinuousError: unless every row is finished."""
    from transformers.generation.continuous_batching import RequestStatus

    failed = [output for output in outputs if output.status != RequestStatus.FINISHED]
    if failed:
        raise ContinuousError(f"continuous batching failed: {failed[0].error or failed[0].status.name}")
    if len(outputs) != count:
        raise ContinuousError(f"continuous batching ended with {len(outputs)} of {count} rows")
    return [output.generated_tokens for output in outputs]


def _behind(ids: torch.Tensor, new: list[list[int]], pad: int) -> torch.Tensor:
    """Appends the new tokens and padding to prompts, int64 [batch, width]."""
    width = max(map(len, new))
    padded = [[*tokens, *[pad] * (width - len(tokens))] for tokens in new]
    return torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], dim=1)
