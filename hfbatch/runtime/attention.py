"""Computes the attention weights of a model for a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hfbatch.errors import SpecError
from hfbatch.hub.models import Model, pin
from hfbatch.runtime.checks import model_faults
from hfbatch.spec.job import ModelSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task, TaskConfig
from hfbatch.tasks.model_support import misfits


@dataclass(frozen=True)
class Attention:
    """Attention weights between all tokens of a text."""

    tokens: list[str]
    """Tokens as strings, without the tokenizer's markers for spaces."""
    weights: np.ndarray
    """float32 [layers, heads, tokens, tokens]: rows are queries, columns are keys."""


def attention_of(text: str, name: str) -> Attention:
    """Returns the attention weights of every layer and head; for encoder-decoder models, of the encoder.

    :param name: a model folder or Hub name.
    :raises SpecError: for a model that takes no text or returns no weights, and an empty or too long text.
    """
    import torch

    model = pin(ModelSpec(name=name)).fetch()
    with model_faults(name):
        task = _reader(model)
        inputs = task.tokenizer(text, return_tensors="pt", verbose=False)
        network = _load(task)
    ids = inputs["input_ids"][0].tolist()
    limit = getattr(task, "limit", None) or len(ids)
    if not 0 < len(ids) <= limit:
        raise SpecError(f"the text has {len(ids)} tokens; model {name!r} takes 1 to {limit}")
    with torch.inference_mode():
        layers = network(**inputs, output_attentions=True).attentions or ()
    known = [layer[0] for layer in layers if layer is not None]
    if not known:
        raise SpecError(f"model {name!r} ({type(network).__name__}) returns no attention weights")
    marks = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵"})
    tokens = [token.translate(marks).strip() for token in task.tokenizer.convert_ids_to_tokens(ids)]
    return Attention(tokens, torch.stack(known).numpy())


def _load(task: Task) -> Any:
    """Loads the model with eager attention, the only one that returns weights; of an encoder-decoder, the encoder."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, task.auto_class).from_pretrained(
        task.model.folder,
        attn_implementation="eager",
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=task.model.trust_remote_code,
    )
    whole = task.auto_class == "AutoModel" and getattr(task.config, "is_encoder_decoder", False)
    return (model.get_encoder() if whole else model).eval()


def _reader(model: Model) -> Task:
    """Returns the task that runs the model without its head on texts."""
    cls = task_class("feature-extraction")
    task = cls(TaskConfig(model, cls.Params()))
    faults = misfits(task)
    if faults:
        raise SpecError(faults)
    return task
