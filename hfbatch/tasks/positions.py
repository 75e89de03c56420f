"""Sizes of a model's position and token embeddings, and models that see padding. Reads the config only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SEE_PADDING = frozenset(
    (
        "big_bird", "bigbird_pegasus", "canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer",
        "perceiver", "recurrent_gemma", "rwkv", "xlstm", "yoso",
    )
)  # fmt: skip
"""Model types whose outputs depend on padding despite the attention mask: they convolve, pool or mix tokens, carry a
state through them, or depend on the length of the batch."""
BEHIND_PADDING = frozenset(
    (
        "altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "esm",
        "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
        "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    )
)  # fmt: skip
"""Model types whose first position is `padding_idx + 1` in a table of `max_position_embeddings` rows.

Source: `create_position_ids_from_input_ids` in transformers' modeling files. Other models with this
numbering have a larger table (BART and OPT: two more rows) or compute as many rows as they need (M2M100, XGLM).
"""
FIXED_PADDING = {"mpnet": 1}
"""`padding_idx` of model types whose code does not read it from the config."""


def position_limit(config: PretrainedConfig) -> int | None:
    """Returns the maximum number of positions; None if the config does not specify it."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:  # LED has separate tables for encoder and decoder
        positions = getattr(text, "max_encoder_position_embeddings", None)
    if positions is None or text.model_type not in BEHIND_PADDING:
        return positions
    if getattr(text, "position_embedding_type", None) == "rotary":  # ESM then has no table
        return positions
    padding = FIXED_PADDING.get(text.model_type, getattr(text, "pad_token_id", None))
    return positions - (padding or 0) - 1


def embedding_rows(config: PretrainedConfig, vocabulary: int | None = None) -> int | None:
    """Returns the number of token ids with an embedding; None if the config does not specify it.

    :param vocabulary: see `Task.vocabulary`.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else max(int(size), vocabulary or 0)


def has_embedding(token: Any, rows: int | None) -> bool:
    """Whether a token id has an embedding; False for None. :param rows: see `embedding_rows`."""
    return token is not None and token >= 0 and (rows is None or token < rows)


def model_padding(config: PretrainedConfig, vocabulary: int | None = None) -> int | None:
    """Returns the padding id in the model's config; None if there is none or it has no embedding.

    :param vocabulary: see `Task.vocabulary`.
    """
    token = getattr(config.get_text_config(), "pad_token_id", None)
    return token if has_embedding(token, embedding_rows(config, vocabulary)) else None
