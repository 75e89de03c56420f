"""Training audio-classification: one label, several labels, or a number for a recording."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.parts.audio import AUDIO, SAMPLES
from hfbatch.train.recipes.parts.labels import LABEL, LabelRecipe
from hfbatch.train.recipes.parts.media import unreadable

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.audio_classification import AudioClassification


class AudioClassificationRecipe(LabelRecipe):
    """Learns the labels of recordings."""

    name = "audio-classification"
    auto_class = "AutoModelForAudioClassification"
    columns = (AUDIO, LABEL)
    task: AudioClassification

    @property
    def processor(self) -> Any:
        """The feature extractor."""
        return self.task.processors["feature_extractor"]

    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """A recording that is null, cannot be decoded or is too short for the model."""
        return unreadable("audio", columns["audio"], lambda one: self.task.rows({"audio": one}))

    @cached_property
    def least(self) -> int:
        """Fewest samples or frames of a batch: masks of training (SpecAugment) hide a run of so many at once."""
        config = self.task.config
        masked = getattr(config, "apply_spec_augment", True) and getattr(config, "mask_time_prob", 0)
        return self.task.samples_of(config.mask_time_length if masked else 1)

    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """What the feature extractor made of each recording, padded to the longest, with a mask if the model heeds it.

        `input_values` [batch, samples] or `input_features` [batch, frames, values], float32, and `attention_mask`.
        """
        made = self.task.collate(features, np.arange(len(features)), 1)["rows"]
        rows = [{name: value[0].numpy() for name, value in steps[0].items()} for steps in made]
        width = max(self.least, *(len(row[self.processor.model_input_names[0]]) for row in rows))
        padded = self.processor.pad(
            rows, padding="max_length", max_length=width, return_tensors="pt",
            return_attention_mask=True if self.task.masks else None,
        )  # fmt: skip
        return dict(padded)

    def prepare(self, model: Any) -> None:
        """Norms over whole recordings leave out padding, as in the task."""
        if self.task.normalise_apart(model):
            model.base_model.register_forward_pre_hook(_tell_lengths, with_kwargs=True)


def _tell_lengths(module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Says for the norms how long each recording of the batch is."""
    mask = inputs.get("attention_mask")
    SAMPLES.set(None if mask is None or bool(mask.all()) else mask.sum(dim=1).tolist())
