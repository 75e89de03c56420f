"""Options of text generation tasks, and their conversion to a GenerationConfig.

Unset options come from the model's generation_config.json, then from the task's defaults, then from those of
`generate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hfbatch.tasks import base

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from hfbatch.hub.models import Model

SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options that have no effect without sampling."""
BEAMS_ONLY = ("early_stopping", "length_penalty")
"""Options that have no effect without beam search."""
PASSED_ON = (
    *("max_new_tokens", "min_new_tokens", "do_sample", *SAMPLING_ONLY, "num_beams", *BEAMS_ONLY),
    *("repetition_penalty", "no_repeat_ngram_size"),
)
"""Params that a GenerationConfig has under the same name."""
NOT_FOLLOWED = (
    *(
        "num_beam_groups",
        "diversity_penalty",
        "penalty_alpha",
        "dola_layers",
        "constraints",
        "force_words_ids",
    ),
    *("guidance_scale", "watermarking_config", "token_healing", "prompt_lookup_num_tokens", "use_mtp"),
    *("assistant_early_exit", "cache_implementation", "max_time"),
)
"""Settings of models that need code from the Hub, mix rows, or only affect speed."""
NOT_FOLLOWED_BEHIND_PROMPT = (
    *("max_length", "min_length", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
)
"""Settings that would count the prompt's padding if the answer follows the prompt in one sequence."""


class DecodingParams(base.Params):
    """Options of text generation. Null uses the model's generation_config, then the default of `generate`."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens to generate per row; if the model sets none, 256 or half of its limit."""
    min_new_tokens: int | None = Field(default=None, ge=0)
    """Minimum tokens to generate per row."""
    do_sample: bool | None = None
    """Sample each token (true) or take the most probable (false); final default: true only for text-generation."""
    temperature: float | None = Field(default=None, gt=0)
    """Divides the logits before sampling; final default: 1, for text-generation 0.7."""
    top_k: int | None = Field(default=None, ge=0)
    """Sample among the k most probable tokens, 0 for all; final default: 50."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the most probable tokens that together reach this probability; final default: 1."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample among tokens with at least this fraction of the highest probability."""
    typical_p: float | None = Field(default=None, gt=0, le=1)
    """Sample among the most typical tokens (typical sampling) that together reach this probability."""
    epsilon_cutoff: float | None = Field(default=None, ge=0, lt=1)
    """Sample among tokens of at least this probability."""
    eta_cutoff: float | None = Field(default=None, ge=0, lt=1)
    """Sample among tokens above a threshold that decreases with the entropy: eta sampling."""
    num_beams: int | None = Field(default=None, ge=1)
    """Number of beams; 1 disables beam search. Beam search does not sample."""
    early_stopping: bool | Literal["never"] | None = None
    """End beam search at num_beams finished candidates (true), when better ones are unlikely, or impossible (never)."""
    length_penalty: float | None = None
    """Above 0 favors longer texts in beam search, below 0 shorter ones."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1, makes tokens that occur in the text already less likely."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    """N-grams of this size occur only once; 0 disables the rule."""


class GenerationParams(DecodingParams):
    """Options of text generation and of the returned columns."""

    num_return_sequences: int = Field(default=1, ge=1)
    """Number of texts per row, sampled or the best beams; above 1, output columns are lists of them."""
    bad_words: tuple[str, ...] = ()
    """Texts to avoid, as tokenized at the start of a text or after a space."""
    stop: tuple[str, ...] | None = None
    """Texts that end the answer, which includes them and the rest of their last token."""
    begin_with: str | None = None
    """Text that every answer begins with; counts as generated."""
    details: bool = False
    """Add columns finish_reason (stop or length), prompt_tokens and new_tokens."""
    log_probs: bool = False
    """Add columns token_ids and log_probs, before penalties and warping; needs one more forward pass per text."""


def read_defaults(model: Model, config: PretrainedConfig) -> GenerationConfig:
    """Reads the model's generation_config.json, or if there is none, the generation options of its config."""
    from transformers import GenerationConfig

    if model.read_json("generation_config.json") is not None:
        return GenerationConfig.from_pretrained(model.folder)
    return GenerationConfig.from_model_config(config)


def resolve(
    defaults: GenerationConfig,
    params: GenerationParams,
    tokenizer: PreTrainedTokenizerBase,
    last: Mapping[str, Any],
    not_followed: tuple[str, ...] = NOT_FOLLOWED,
) -> GenerationConfig:
    """Merges the options of the user, the model and the task, in this order; drops options without effect.

    :param last: values for options that neither the user nor the model sets.
    :param not_followed: settings of the model to ignore.
    """
    config = deepcopy(defaults)
    for name in (*not_followed, *config.extra_output_flags):
        setattr(config, name, None)
    for name in PASSED_ON:
        if getattr(params, name) is not None:
            setattr(config, name, getattr(params, name))
    if params.do_sample is None and (config.num_beams or 1) > 1:
        config.do_sample = False
    for name, value in last.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    # generate warns about these, even if the user did not set them.
    idle = () if config.do_sample else (*SAMPLING_ONLY, "top_h")
    for name in (*idle, *(BEAMS_ONLY if (config.num_beams or 1) == 1 else ())):
        setattr(config, name, None)
    if params.bad_words:
        config.bad_words_ids = bad_words_ids(tokenizer, params.bad_words)
    if params.stop is not None:
        config.stop_strings = list(params.stop) or None
    config.num_return_sequences, config.return_dict_in_generate, config.use_cache = 1, False, True
    return config


def bad_words_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[list[int]]:
    """Returns the tokens of each word at the start of a text and after a space."""
    texts = [text for word in words for text in (word, f" {word}")]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [list(tokens) for tokens in dict.fromkeys(map(tuple, ids)) if tokens]


def generation_faults(params: GenerationParams, config: GenerationConfig) -> list[str]:
    """Returns errors for params that contradict each other, have no effect, or are rejected by transformers.

    :param config: the result of `resolve`.
    """
    sampling, beams = bool(config.do_sample), config.num_beams or 1
    faults = idle_faults(params, sampling, beams) + _count_faults(
        params.num_return_sequences, sampling, beams
    )
    if sampling and beams > 1:
        faults.append(
            f"params.do_sample=true does not work with num_beams={beams}, "
            "whose draws would depend on the batch; set params.num_beams=1 or do_sample=false"
        )
    if sampling and not (config.temperature is None or config.temperature > 0):
        faults.append(
            f"the model's generation_config samples with temperature {config.temperature}; "
            "set params.temperature, or params.do_sample=false"
        )
    most, fewest = config.max_new_tokens, config.min_new_tokens
    if most is not None and fewest is not None and fewest > most:
        faults.append(f"min_new_tokens={fewest} is more than max_new_tokens={most}; set fewer in params")
    for name in ("bad_words", "stop"):
        if any(not text for text in getattr(params, name) or ()):
            faults.append(f"params.{name} holds an empty text; leave it out")
    return faults or _refused(config)


def idle_faults(params: DecodingParams, sampling: bool, beams: int) -> list[str]:
    """Returns errors for options that would have no effect."""
    faults = []
    idle = [name for name in SAMPLING_ONLY if getattr(params, name) is not None]
    if idle and not sampling:
        faults.append(
            f"params: {', '.join(idle)} only work when sampling; set params.do_sample=true or leave out"
        )
    idle = [name for name in BEAMS_ONLY if getattr(params, name) is not None]
    if idle and beams == 1:
        faults.append(
            f"params: {', '.join(idle)} only work in beam search; set params.num_beams or leave out"
        )
    return faults


def _count_faults(count: int, sampling: bool, beams: int) -> list[str]:
    if count == 1 or sampling or count <= beams:
        return []
    if beams == 1:
        return [
            f"params.num_return_sequences={count} would return equal texts, since nothing is sampled; "
            "set params.do_sample=true, params.num_beams or num_return_sequences=1"
        ]
    return [f"params.num_return_sequences={count} is more than num_beams={beams}; set at most {beams}"]


def _refused(config: GenerationConfig) -> list[str]:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return [f"transformers refuses these options of generation: {' '.join(str(error).split())}"]
    return []


def generation_notes(
    params: GenerationParams,
    defaults: GenerationConfig,
    config: GenerationConfig,
    not_followed: tuple[str, ...] = NOT_FOLLOWED,
) -> list[str]:
    """Returns notes on defaults, and on the model's settings that are not followed."""
    found = []
    if config.do_sample and params.do_sample is None:
        found.append(
            f"samples with temperature {config.temperature or 1:g}, as the model's generation_config or the "
            "transformers pipeline does by default; params.do_sample=false takes the most probable token"
        )
    if (config.num_beams or 1) > 1 and params.num_beams is None:
        found.append(f"searches {config.num_beams} beams, as the model says (params.num_beams)")
    if params.max_new_tokens is None:
        most = config.max_new_tokens or config.max_length
        found.append(f"generates up to {most} tokens a row (params.max_new_tokens)")
    values = {name: getattr(defaults, name, None) for name in not_followed if name != "cache_implementation"}
    ignored = {name: value for name, value in values.items() if value not in (None, 0, 1, False)}
    if ignored:
        shown = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
        found.append(f"not followed from the model's generation_config: {shown}")
    return found
