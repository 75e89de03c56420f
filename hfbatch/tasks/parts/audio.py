"""What tasks over sound share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa

from hfbatch.data.media import is_sound_like, to_sound
from hfbatch.tasks.base import InputColumn
from hfbatch.tasks.parts.pipeline import PipelineTask

AUDIO = InputColumn(
    "audio",
    is_sound_like,
    "binary, string (path or URL), struct<bytes, path> or struct<array, sampling_rate>",
)


class AudioTask(PipelineTask):
    """Base of tasks that take one recording a row."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (AUDIO,)
    takes = frozenset({"audio"})
    split_rows = 256

    @property
    def rate(self) -> int:
        """Samples a second that the model takes."""
        return int(self.processors["feature_extractor"].sampling_rate)

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Recordings, decoded one by one: one channel at the model's rate."""
        for value in columns["audio"]:
            yield to_sound(value.as_py(), self.rate, self.root)
