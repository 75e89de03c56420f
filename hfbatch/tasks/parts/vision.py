"""What tasks over pictures share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pyarrow as pa

from hfbatch.data.media import is_file_like, to_image
from hfbatch.tasks.base import InputColumn
from hfbatch.tasks.parts.pipeline import PipelineTask

IMAGE = InputColumn("image", is_file_like, "binary, string (path or URL) or struct<bytes, path>")
BOX = pa.struct([(side, pa.int32()) for side in ("xmin", "ymin", "xmax", "ymax")])
DETECTED = pa.list_(pa.struct([("score", pa.float32()), ("label", pa.string()), ("box", BOX)]))


class ImageTask(PipelineTask):
    """Base of tasks that take one picture a row."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (IMAGE,)
    takes = frozenset({"image"})
    split_rows = 256

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Pictures, decoded one by one."""
        for value in columns["image"]:
            yield to_image(value.as_py(), self.root)
