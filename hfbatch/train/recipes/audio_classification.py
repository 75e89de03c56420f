"""Training audio-classification: one label, several labels, or a number for a recording."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.audio.audio import AUDIO, SAMPLES
from hfbatch.train.recipes.labels import LABEL, LabelRecipe
from hfbatch.train.recipes.media import unreadable

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.audio.audio_classification import AudioClassification


class AudioClassificationRecipe(LabelRecipe):
    """Trains audio classification."""

    name = "audio-classification"
    auto_class = "AutoModelForAudioClassification"
    columns = (AUDIO, LABEL)
    task: AudioClassification

    @property
    def processor(self) -> Any:
        """The feature extractor."""
        return self.task.processors["feature_extractor"]

    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """Finds recordings that are null, cannot be decoded or are too short for the model."""
        return unreadable("audio", columns["audio"], lambda one: self.task.rows({"audio": one}))

    @cached_property
    def least(self) -> int:
        """Minimum samples or frames of a batch: at least the length of one mask of SpecAugment, which training uses."""
        config = self.task.config
        masked = getattr(config, "apply_spec_augment", True) and getattr(config, "mask_time_prob", 0)
        return self.task.samples_of(config.mask_time_length if masked else 1)

    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Pads the feature extractor's output to the longest recording, with a mask if the model uses one.

        Returns `input_values` [batch, samples] or `input_features` [batch, frames, values], float32, and
        `attention_mask`.
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
        """Excludes padding from norms over whole recordings, as the task does."""
        if self.task.normalise_apart(model):
            model.base_model.register_forward_pre_hook(_set_lengths, with_kwargs=True)


def _set_lengths(module: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Sets the length of each recording of the batch for the norms."""
    mask = inputs.get("attention_mask")
    SAMPLES.set(None if mask is None or bool(mask.all()) else mask.sum(dim=1).tolist())
