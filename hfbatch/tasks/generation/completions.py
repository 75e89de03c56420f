"""Results of row engines, in the form in which batches return theirs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from hfbatch.engines.base import Completion, Request


def as_outputs(
    requests: Sequence[Request], completions: Sequence[Completion], log_probs: bool, constrained: bool
) -> dict[str, np.ndarray]:
    """Returns one text for each row, see `decoder.Decoder.join_texts`.

    :param log_probs: whether the completions have log-probabilities.
    :param constrained: whether the texts have a constraint.
    """
    lengths = np.array([len(made.tokens) for made in completions], np.int64)
    inside = np.arange(lengths.max(initial=0))[None, :] < lengths[:, None]

    def padded(values: Iterable[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
        found = np.zeros(inside.shape, dtype)
        found[inside] = np.fromiter(chain.from_iterable(values), dtype)
        return found

    stopped = np.array([[made.stopped] for made in completions], bool)
    outputs = {
        "tokens": padded((made.tokens for made in completions), np.int32),
        "lengths": lengths[:, None],
        "length": lengths,
        "stopped": stopped,
        "prompt": np.array([len(request.prompt) for request in requests], np.int64),
    }
    if log_probs:
        outputs["log_probs"] = padded((made.log_probs or () for made in completions), np.float32)
    if constrained:
        complete = [made.stopped if made.complete is None else made.complete for made in completions]
        outputs["complete"] = np.array(complete, bool)[:, None]
    return outputs
