"""Compares two generating models on the same texts: the probability of each token, given the tokens before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfbatch.engines.log_probs import distributions
from hfbatch.tasks.agreement import Comparison

if TYPE_CHECKING:
    from hfbatch.tasks.generation.decoder import Decoder

TOKENS = 32
"""New tokens of each text."""


def compare_models(
    decoder: Decoder, reference: Any, model: Any, batches: list[dict[str, np.ndarray]]
) -> Comparison:
    """Generates a text for each row with the reference, and computes the probability of its tokens with both.

    :param batches: inputs of `generate`, each of a single row without padding.
    """
    changes, same, config = [], [], decoder.config
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    with torch.inference_mode():
        for arrays in batches:
            batch = {name: torch.from_numpy(array).to(reference.device) for name, array in arrays.items()}
            made = decoder(reference, batch, TOKENS)
            tokens = made["tokens"][:, : int(made["lengths"].flatten()[0])].long()
            if not tokens.shape[1]:
                continue
            one, other = (log_probs_after(start, each, batch, tokens) for each in (reference, model))
            index = tokens[0, :, None].cpu()
            changes.append((one.gather(1, index) - other.gather(1, index)).abs().flatten().cpu().numpy())
            same.append((one.argmax(1) == other.argmax(1)).cpu().numpy())
    if not changes:
        return Comparison(np.ones(0), {}, "a token")
    return Comparison(
        np.clip([1 - change.mean() for change in changes], 0, 1),
        {
            "log_prob_change_mean": float(np.concatenate(changes).mean()),
            "next_token_agreement": float(np.concatenate(same).mean()),
        },
    )


def log_probs_after(
    start: int | None, model: Any, batch: Mapping[str, torch.Tensor], tokens: torch.Tensor
) -> torch.Tensor:
    """Returns the log-probabilities at each token of a text, float32 [tokens, vocabulary].

    :param start: the token that the decoder of an encoder-decoder model begins with. The model itself would not know: mBART
        begins training with the last token of a text.
    :param tokens: int64 [1, tokens].
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "seed"}
    tokens = tokens.to(model.device)
    if model.config.is_encoder_decoder:
        begun = torch.cat([torch.full_like(tokens[:, :1], int(start or 0)), tokens[:, :-1]], dim=1)
        inputs["decoder_input_ids"] = begun
    else:
        ids = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return distributions(model, inputs, tokens.shape[1]).to("cpu")
