"""Models that make one vector of a picture, alone or in one space with texts as CLIP does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hfbatch.tasks.base import InputColumn, Task
from hfbatch.tasks.parts.pixels import Pixels
from hfbatch.tasks.parts.pooling import pool
from hfbatch.tasks.parts.text import text_column
from hfbatch.tasks.parts.vision import IMAGE

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

FULL_WIDTH = ("siglip", "siglip2")
"""Types of models trained on texts that are padded to the limit, and without a mask."""


class TextOrImageTask(Task):
    """Base of tasks whose model encodes texts, pictures, or either."""

    inputs = (text_column("text", required=False), replace(IMAGE, required=False))
    exclusive = ("text", "image")
    takes = frozenset(exclusive)

    @cached_property
    def encodes(self) -> tuple[str, ...]:
        """What the model makes vectors of: text, image, or both."""
        return encodes(self.config)

    @cached_property
    def embedded(self) -> int | None:
        """How many token ids the model has embeddings for; None for one of pictures alone."""
        return super().embedded if "text" in self.encodes else None

    @cached_property
    def pixels(self) -> Pixels:
        """The model's image processor."""
        return Pixels(self.model)

    def columns(self) -> tuple[InputColumn, ...]:
        """Those that the model encodes; of two, either will do."""
        found = (column for column in self.inputs if column.name in self.encodes)
        return tuple(replace(column, required=len(self.encodes) == 1) for column in found)

    def column_faults(self, present: set[str]) -> list[str]:
        """Exactly one of `text` and `image` has to be there for a model that encodes both."""
        if len(self.encodes) == 2 and not present:
            return ["input has no texts and no pictures; use --column text=COLUMN or --column image=COLUMN"]
        if len(present) > 1:
            return [
                "columns 'text' and 'image' are both in input; "
                "name the one to read: --column text=text or --column image=image"
            ]
        return []


def encodes(config: PretrainedConfig) -> tuple[str, ...]:
    """What AutoModel makes one vector of for a config: `text`, `image`, or both in one space."""
    from transformers import AutoModel

    known = AutoModel._model_mapping
    model = known.get(type(config), None)
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return ("text", "image")
    return ("image",) if getattr(model, "main_input_name", None) == "pixel_values" else ("text",)


def encode_texts(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A vector for each text, by a model that encodes both: [texts, size]."""
    known = inspect.signature(model.get_text_features).parameters
    return model.get_text_features(**{name: batch[name] for name in batch if name in known}).pooler_output


def encode_pictures(
    model: Any, inputs: Mapping[str, torch.Tensor], poolings: tuple[str, ...] = ()
) -> torch.Tensor:
    """A vector for each picture: [pictures, size].

    :param poolings: how the vectors of patches are joined, for a model of pictures alone; none takes the vector
        that the model itself makes of them.
    :raises KeyError: where it makes none.
    """
    if hasattr(model, "get_image_features"):
        return model.get_image_features(**inputs).pooler_output
    output = model(**inputs)
    return pool(output[0], None, poolings) if poolings else output["pooler_output"].flatten(1)
