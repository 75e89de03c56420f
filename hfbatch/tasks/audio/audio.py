"""Base classes of audio tasks: decode recordings, and batch recordings of different lengths."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from hfbatch.data.media import is_audio_like, to_audio
from hfbatch.tasks.base import Batch, InputColumn
from hfbatch.tasks.pipelines.pipeline import Inputs, LabelTask, PipelineTask, cost_of, join

if TYPE_CHECKING:
    import torch

AUDIO = InputColumn(
    "audio",
    is_audio_like,
    "binary, string (path or URL), struct<bytes, path> or struct<array, sampling_rate>",
    files=True,
)
MASKING = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
"""Models over samples that ignore masked padding, except for the norm of each channel over the whole recording that
some of them have (`feat_extract_norm: group`), see `normalise_rows`."""
SEES_PADDING = ("add_adapter", "conv_pos_batch_norm")
"""Options of these models with which padding affects the output."""
WIDEST = 1.1
"""Maximum ratio of the longest to the shortest recording in a batch, which limits padding."""
SAMPLES: ContextVar[list[int] | None] = ContextVar("SAMPLES", default=None)
"""Samples of each row of the batch that this thread computes, if some rows are padded."""


class AudioTask(PipelineTask):
    """Base class of tasks that take one recording per row.

    Recordings of different lengths share a batch if padding does not change the result: for models in MASKING.
    """

    inputs: ClassVar[tuple[InputColumn, ...]] = (AUDIO,)
    takes = frozenset({"audio"})
    split_rows = 256

    @property
    def rate(self) -> int:
        """The model's sampling rate in samples per second."""
        return int(self.processors["feature_extractor"].sampling_rate)

    @cached_property
    def masks(self) -> bool:
        """Whether masked padding leaves the model's output unchanged."""
        sees = any(getattr(self.config, name, False) for name in SEES_PADDING)
        return self.config.model_type in MASKING and not sees

    @cached_property
    def shortest(self) -> int:
        """Minimum number of samples for one frame; 1 if the config has no convolutions."""
        return self.samples_of(1)

    def samples_of(self, frames: int) -> int:
        """Returns the minimum number of samples for the given frames; equal to it if the config has no convolutions."""
        config, samples = self.config, frames
        layers = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True)
        for kernel, stride in reversed(list(layers)):
            samples = (samples - 1) * stride + kernel
        return samples

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields recordings, decoded one by one: one channel at the model's sampling rate, float32 [samples].

        :raises ValueError: for invalid audio, and a recording too short for one frame of the model.
        """
        for value in columns["audio"]:
            samples = to_audio(value.as_py(), self.rate, self.files)
            if len(samples) < self.shortest:
                raise ValueError(f"the recording has {len(samples)} samples, the model needs {self.shortest}")
            yield samples

    def over(self, model: Any) -> Any:
        """Returns the pipeline over a model that normalizes each row of a batch independently."""
        self.normalise_apart(model)
        return super().over(model)

    def normalise_apart(self, model: Any) -> bool:
        """Makes a norm over whole recordings ignore padding; returns whether the model has such a norm."""
        if not self.masks or self.config.feat_extract_norm != "group":
            return False
        norm = model.base_model.feature_extractor.conv_layers[0].layer_norm
        norm.register_forward_hook(normalise_rows(self.config.conv_kernel[0], self.config.conv_stride[0]))
        return True

    def is_padded(self, step: Mapping[str, Any]) -> bool:
        """Whether a step may be padded to the length of another."""
        return self.masks and cost_of(step) >= self.shortest

    def kin_of(self, step: Mapping[str, Any]) -> Any:
        """Returns the batching key: names and an approximate length for steps that may be padded, else also shapes."""
        if not self.is_padded(step):
            return super().kin_of(step)
        return tuple(step), int(math.log(cost_of(step), WIDEST))

    def together(self, rows: list[Inputs]) -> Inputs:
        """Concatenates rows, padded with masked zeros."""
        widths = [width_of(row) for row in rows]
        if len(set(widths)) == 1:
            return join(rows)
        return join([pad(row, max(widths)) for row in rows])

    def _run(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Returns the model outputs of each step, with the true lengths available to the norm."""
        widths = [width_of(row) for row in rows]
        token = SAMPLES.set(widths if len(set(widths)) > 1 else None)
        try:
            return self.compute(pipe, rows)
        finally:
            SAMPLES.reset(token)

    def compute(self, pipe: Any, rows: list[Inputs]) -> list[Any]:
        """Returns the model outputs of steps with the same batching key."""
        return super()._run(pipe, rows)

    def padded_size(self, batch: Batch) -> int:
        """Returns the number of samples or frames that the device computes."""
        steps = [step for row in batch["rows"] for step in row]
        costs = [cost_of(step) for step in steps]
        return max(costs) * len(costs) if all(map(self.is_padded, steps)) else sum(costs)


class AudioLabelTask(LabelTask, AudioTask):
    """Base class of tasks that return labels of a recording, some of which use only its beginning or a part."""

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether a recording is longer than the part that the model takes."""
        return self.longest is not None and len(row) > self.longest

    @cached_property
    def longest(self) -> int | None:
        """Maximum number of samples that the feature extractor keeps; None if it keeps all."""
        extractor = self.processors["feature_extractor"]
        if self.config.model_type == "audio-spectrogram-transformer":  # frames of 25 ms, one every 10 ms
            return self.rate // 40 + (extractor.max_length - 1) * (self.rate // 100)
        known = (getattr(extractor, name, None) for name in ("n_samples", "nb_max_samples"))
        return next((int(samples) for samples in known if samples), None)


def width_of(step: Mapping[str, Any]) -> int:
    """Returns the samples or frames of a step: the last dimension of its first tensor."""
    import torch

    return next((value.shape[-1] for value in step.values() if isinstance(value, torch.Tensor)), 0)


def pad(step: Inputs, width: int) -> Inputs:
    """Pads all tensors of a step with zeros at the end, up to width, and adds a mask of the padding."""
    import torch
    from torch.nn.functional import pad as pad_tensor

    known = width_of(step)
    padded = UserDict({"attention_mask": torch.ones(1, known, dtype=torch.long), **step})
    for key, value in padded.items():
        if isinstance(value, torch.Tensor):
            padded[key] = pad_tensor(value, (0, width - value.shape[-1]))
    return padded


def normalise_rows(kernel: int, stride: int) -> Any:
    """Returns a hook that makes a norm over time ignore the padding of each row of SAMPLES.

    :param kernel: samples in a frame of the layer that the norm belongs to.
    :param stride: samples between frames.
    """

    def hook(norm: torch.nn.GroupNorm, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Replaces the norm's output, [batch, channels, frames]."""
        samples = SAMPLES.get()
        if samples is None:
            return output
        for k, count in enumerate(samples):
            frames = (count - kernel) // stride + 1
            output[k : k + 1, :, :frames] = norm.forward(inputs[0][k : k + 1, :, :frames])
        return output

    return hook
