"""How the next token is chosen: generation config and call of `generate`. Knows nothing of text and Arrow."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig

    from hfbatch.data.models import Model

SAMPLING_ONLY = ("temperature", "top_k", "top_p")
"""Options that greedy decoding does not use."""
WARPING = (*SAMPLING_ONLY, "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
NOT_FOLLOWED = (
    *("num_beams", "penalty_alpha", "guidance_scale", "token_healing"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "cache_implementation"),
    *("max_length", "min_length", "max_time", "stop_strings"),
)
"""Other ways to decode, and limits that count the prompt with its padding, seconds or characters."""
PIPELINE_DEFAULTS = {"do_sample": True, "temperature": 0.7, "top_k": 50}
"""What the transformers pipeline takes where neither the user nor the model says."""


def read_defaults(model: Model, config: PretrainedConfig) -> GenerationConfig:
    """The model's generation_config.json, or where there is none, what its config says."""
    from transformers import GenerationConfig

    if model.read_json("generation_config.json") is not None:
        return GenerationConfig.from_pretrained(model.folder)
    return GenerationConfig.from_model_config(config)


def resolve(defaults: GenerationConfig, chosen: Mapping[str, Any], max_new_tokens: int) -> GenerationConfig:
    """The user's choices, then the model's, then the pipeline's; without the settings in NOT_FOLLOWED.

    :param max_new_tokens: where neither the user nor the model says.
    """
    config = deepcopy(defaults)
    for name in NOT_FOLLOWED:
        setattr(config, name, None)
    for name, value in chosen.items():
        setattr(config, name, value)
    for name, value in {**PIPELINE_DEFAULTS, "max_new_tokens": max_new_tokens}.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    config.num_return_sequences, config.return_dict_in_generate, config.use_cache = 1, False, True
    return config


def not_followed(defaults: GenerationConfig) -> dict[str, Any]:
    """Settings of the model that change its output and that `resolve` leaves out."""
    values = {name: getattr(defaults, name, None) for name in NOT_FOLLOWED if name != "cache_implementation"}
    return {name: value for name, value in values.items() if value not in (None, 0, 1, False)}


def generate(
    model: Any,
    batch: dict[str, torch.Tensor],
    config: GenerationConfig,
    count: int = 1,
    limit: int | None = None,
) -> dict[str, torch.Tensor]:
    """Continues each row until all have met an eos token or `config.max_new_tokens`.

    :param batch: `input_ids` and `attention_mask`, int64 [batch, width], padded on the left; when sampling,
        `seed`, int64 [batch].
    :param count: sequences of each row.
    :param limit: stop after this many new tokens even so.
    :returns: `tokens`, int32 [batch, count * new width], the new tokens of a row's sequences one after another
        and padding behind them; `lengths`, int64 [batch, count], tokens of each; `length`, int64 [batch], their
        sum.
    """
    ids = batch["input_ids"].repeat_interleave(count, dim=0)
    mask = batch["attention_mask"].repeat_interleave(count, dim=0)
    greedy = deepcopy(config)
    greedy.do_sample = False
    greedy.max_new_tokens = min(config.max_new_tokens, limit or config.max_new_tokens)
    # The sampler below has these; generate warns of sampling options beside greedy decoding.
    for name in WARPING:
        setattr(greedy, name, None)
    # generate fills what is unset from the model's own config, which would bring back what is not followed.
    model.generation_config = greedy
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=greedy,
        logits_processor=_sampler(batch["seed"], ids.shape[1], config, count) if config.do_sample else None,
    )
    return _pack(made[:, ids.shape[1] :], config.eos_token_id, count)


def _sampler(seeds: torch.Tensor, width: int, config: GenerationConfig, count: int) -> LogitsProcessorList:
    """The warpers and the noise with which the likeliest token is a random draw."""
    import torch
    from transformers import LogitsProcessorList

    from hfbatch.tasks.parts.sampling import GumbelNoise, splitmix64, warpers

    sequence = torch.arange(count, device=seeds.device)
    each = splitmix64(seeds[:, None], sequence[None, :]).flatten()
    return LogitsProcessorList([*warpers(config, seeds.device), GumbelNoise(each, width)])


def _pack(made: torch.Tensor, eos: int | list[int] | None, count: int) -> dict[str, torch.Tensor]:
    """Cuts new tokens, int64 [batch * count, width], behind the first eos and joins a row's sequences."""
    import torch

    width = made.shape[1]
    inside = torch.ones_like(made, dtype=torch.bool)
    if eos is not None:
        ends = torch.isin(made, torch.tensor(eos, device=made.device).reshape(-1)).int()
        inside = ends.cumsum(dim=1) - ends == 0
    lengths = inside.sum(dim=1).reshape(-1, count)
    tokens = made.to(torch.int32).reshape(-1, count * width)
    if count > 1:
        order = inside.reshape(-1, count * width).int().argsort(dim=1, descending=True, stable=True)
        tokens = tokens.gather(1, order)
    return {"tokens": tokens, "lengths": lengths, "length": lengths.sum(dim=1)}
