"""Encodes images into one vector each, with image models or with joint image-text models such as CLIP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hfbatch.engines.base import Capability
from hfbatch.tasks.base import InputColumn, Task
from hfbatch.tasks.text.pooling import pool
from hfbatch.tasks.tokens import text_column
from hfbatch.tasks.vision.pixels import Pixels
from hfbatch.tasks.vision.vision import IMAGE

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

FULL_WIDTH = ("siglip", "siglip2")
"""Model types trained on texts padded to the maximum length, without an attention mask."""

TEXT_MODELS = (
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)
"""Tables of transformers, by model type, of which no model's AutoModel encodes images."""


class TextOrImageTask(Task):
    """Base class of tasks whose model encodes texts, images, or either."""

    inputs = (text_column("text", required=False), replace(IMAGE, required=False))
    exclusive = ("text", "image")
    takes = frozenset(exclusive)

    @cached_property
    def encodes(self) -> tuple[str, ...]:
        """Modalities that the model encodes: text, image, or both."""
        return encodes(self.config)

    @cached_property
    def embedded(self) -> int | None:
        """Number of token ids with an embedding; None for an image model."""
        return super().embedded if "text" in self.encodes else None

    @cached_property
    def pixels(self) -> Pixels:
        """The model's image processor."""
        return Pixels(self.model)

    @property
    def asks(self) -> frozenset[Capability]:
        """Also the module of a model that encodes both, for its `get_text_features` and `get_image_features`."""
        return super().asks | {Capability.MODULE} if len(self.encodes) == 2 else super().asks

    def columns(self) -> tuple[InputColumn, ...]:
        """Returns the inputs that the model encodes; each of two is optional."""
        found = (column for column in self.inputs if column.name in self.encodes)
        return tuple(replace(column, required=len(self.encodes) == 1) for column in found)

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error unless a model that encodes both has exactly one of `text` and `image`."""
        if len(self.encodes) == 2 and not present:
            return ["input has no texts and no images; use --column text=COLUMN or --column image=COLUMN"]
        if len(present) > 1:
            return [
                "columns 'text' and 'image' are both in input; "
                "name the one to read: --column text=text or --column image=image"
            ]
        return []


def encodes(config: PretrainedConfig) -> tuple[str, ...]:
    """Returns the modalities that AutoModel encodes for a config: `text`, `image`, or both in one space."""
    from transformers.models.auto import modeling_auto as models

    if any(config.model_type in table for table in (getattr(models, name) for name in TEXT_MODELS)):
        return ("text",)  # without importing the model's code, which takes seconds
    model = models.AutoModel._model_mapping.get(type(config), None)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return ("text", "image")
    return ("image",) if getattr(model, "main_input_name", None) == "pixel_values" else ("text",)


def encode_texts(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Encodes texts with a model that encodes both modalities: [texts, size]."""
    known = inspect.signature(model.get_text_features).parameters
    return model.get_text_features(**{name: batch[name] for name in batch if name in known}).pooler_output


def encode_images(
    model: Any, inputs: Mapping[str, torch.Tensor], poolings: tuple[str, ...] = ()
) -> torch.Tensor:
    """Encodes images into one vector each: [images, size].

    :param poolings: poolings of the patch vectors, for an image model; if empty, returns the vector that the
        model itself computes.
    :raises KeyError: if the model computes none.
    """
    if hasattr(model, "get_image_features"):
        return model.get_image_features(**inputs).pooler_output
    output = model(**inputs)
    return pool(output[0], None, poolings) if poolings else output["pooler_output"].flatten(1)
