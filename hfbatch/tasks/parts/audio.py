"""What tasks over sound share."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from hfbatch.data.media import is_sound_like, to_sound
from hfbatch.tasks.base import Batch, InputColumn
from hfbatch.tasks.parts.pipeline import Inputs, PipelineTask, cost_of, join

AUDIO = InputColumn(
    "audio",
    is_sound_like,
    "binary, string (path or URL), struct<bytes, path> or struct<array, sampling_rate>",
)
MASKING = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
"""Models over samples that see nothing behind the end of a recording where a mask says so, provided that they
normalise each frame by itself (`feat_extract_norm: layer`), not each channel over the whole recording."""


class AudioTask(PipelineTask):
    """Base of tasks that take one recording a row.

    Recordings of different lengths run as one batch where padding does not change the answer: models in MASKING.
    """

    inputs: ClassVar[tuple[InputColumn, ...]] = (AUDIO,)
    split_rows = 256

    @property
    def rate(self) -> int:
        """Samples a second that the model takes."""
        return int(self.processors["feature_extractor"].sampling_rate)

    @cached_property
    def masks(self) -> bool:
        """Whether padding that a mask hides leaves the model's answer as it is."""
        kind, norm = self.config.model_type, getattr(self.config, "feat_extract_norm", "")
        return kind in MASKING and norm == "layer"

    @cached_property
    def shortest(self) -> int:
        """Fewest samples that give a frame; 1 where convolutions are no part of the config."""
        config, samples = self.config, 1
        layers = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True)
        for kernel, stride in reversed(list(layers)):
            samples = (samples - 1) * stride + kernel
        return samples

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Recordings, decoded one by one: one channel at the model's rate, float32 [samples].

        :raises ValueError: for what is no sound, and a recording too short for one frame of the model.
        """
        for value in columns["audio"]:
            samples = to_sound(value.as_py(), self.rate, self.root)
            if len(samples) < self.shortest:
                raise ValueError(f"the recording has {len(samples)} samples, the model needs {self.shortest}")
            yield samples

    def is_padded(self, step: Mapping[str, Any]) -> bool:
        """Whether a step may be padded to the length of another."""
        return self.masks and "attention_mask" in step and cost_of(step) >= self.shortest

    def kin_of(self, step: Mapping[str, Any]) -> Any:
        """Names alone for steps that are padded, else shapes too."""
        return tuple(step) if self.is_padded(step) else super().kin_of(step)

    def together(self, rows: list[Inputs]) -> Inputs:
        """Rows end to end, padded with zeros that the mask hides."""
        return join(pad(rows)) if self.is_padded(rows[0]) else join(rows)

    def padded_size(self, batch: Batch) -> int:
        """Samples or frames that the device computes."""
        steps = [step for row in batch["rows"] for step in row]
        costs = [cost_of(step) for step in steps]
        return max(costs) * len(costs) if all(map(self.is_padded, steps)) else sum(costs)


def pad(rows: list[Inputs]) -> list[Inputs]:
    """Rows with zeros behind all tensors, up to the longest: the last dimension is time."""
    import torch
    from torch.nn.functional import pad as pad_tensor

    def padded(value: Any) -> Any:
        """A tensor made as long as the longest mask."""
        return pad_tensor(value, (0, longest - value.shape[-1])) if isinstance(value, torch.Tensor) else value

    longest = max(row["attention_mask"].shape[-1] for row in rows)
    return [UserDict({key: padded(value) for key, value in row.items()}) for row in rows]
