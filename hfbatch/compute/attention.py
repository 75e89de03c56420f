"""Attention weights of a text, from the model itself. Knows nothing of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hfbatch.compute.checks import model_faults
from hfbatch.data.models import Model, pin
from hfbatch.errors import SpecError
from hfbatch.spec import ModelSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from hfbatch.tasks.parts.fit import misfits


@dataclass(frozen=True)
class Attention:
    """How much each token of a text looks at each other one."""

    tokens: list[str]
    """As the tokenizer writes them, without its marks for spaces."""
    weights: np.ndarray
    """float32 [layers, heads, tokens, tokens]: row, the token that looks; column, the one that is looked at."""


def attention_of(text: str, name: str) -> Attention:
    """The attention weights of every layer and head, from the encoder where the model has encoder and decoder.

    :param name: a model folder or Hub name.
    :raises SpecError: for a model that reads no text or gives no weights, and a text without tokens or too long.
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
        raise SpecError(f"model {name!r} ({type(network).__name__}) gives no attention weights")
    marks = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵"})
    tokens = [token.translate(marks).strip() for token in task.tokenizer.convert_ids_to_tokens(ids)]
    return Attention(tokens, torch.stack(known).numpy())


def _load(task: Task) -> Any:
    """The model in eager attention, which alone hands its weights out; of two halves, the encoder."""
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
    """The task that reads texts with whatever is below the model's head."""
    cls = task_class("feature-extraction")
    task = cls(model, cls.Params())
    faults = misfits(task)
    if faults:
        raise SpecError(faults)
    return task
