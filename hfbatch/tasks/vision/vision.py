"""Base classes of image tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.media import is_file_like, to_image
from hfbatch.tasks.base import Batch, Features, InputColumn, Task
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.vision.pixels import Pixels, run_by_shape, size_of, sizes_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from hfbatch.data.media_files import RowFiles

IMAGE = InputColumn("image", is_file_like, "binary, string (path or URL) or struct<bytes, path>", files=True)
BOX = pa.struct([(side, pa.int32()) for side in ("xmin", "ymin", "xmax", "ymax")])
DETECTED = pa.list_(pa.struct([("score", pa.float32()), ("label", pa.string()), ("box", BOX)]))


def decoded(column: pa.Array, files: RowFiles) -> Iterator[Image]:
    """Decodes the images of a column one by one, upright and in RGB. :raises ValueError: for an unreadable image."""
    for value in column:
        yield to_image(value.as_py(), files)


class ImageTask(PipelineTask):
    """Base class of tasks that run one image per row through a transformers pipeline."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (IMAGE,)
    takes = frozenset({"image"})
    split_rows = 256

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields images, decoded one by one."""
        yield from decoded(columns["image"], self.files)


class PixelTask(Task):
    """Base class of tasks that run the model directly on batches of images."""

    inputs: ClassVar[tuple[InputColumn, ...]] = (IMAGE,)
    takes = frozenset({"image"})
    split_rows = 256

    @cached_property
    def pixels(self) -> Pixels:
        """The model's image processor."""
        return Pixels(self.model)

    def check(self) -> list[str]:
        """Loads the image processor. :raises OSError: for a model without one."""
        _ = self.pixels.processor
        return []

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Resizes and crops each image. :raises ValueError: for an unreadable image."""
        return Features(self.pixels.features(decoded(columns["image"], self.files)))

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of elements in the model inputs of each image."""
        return sizes_of(features)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns one array for the images of each shape."""
        return self.pixels.collate(features, rows)

    def padded_size(self, batch: Batch) -> int:
        """Returns the number of elements in the model inputs."""
        return size_of(batch)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the results of `run`, called once for each image shape."""
        return run_by_shape(batch, model.dtype, lambda inputs: self.run(model, inputs))

    @abstractmethod
    def run(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the model on inputs of equal shape; returns the outputs of forward for them."""


def shapes_of(
    task: Task, pixels: Pixels, run: Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> dict[str, tuple[int, ...]]:
    """Returns the output shapes of run for one image, from a model without weights, so that nothing is computed."""
    import torch
    import transformers
    from PIL import Image

    with torch.device("meta"):
        model = getattr(transformers, task.auto_class).from_config(
            task.config, trust_remote_code=task.model.trust_remote_code
        )
    batch = pixels.collate(pixels.features([Image.new("RGB", (64, 64))]), np.zeros(1, np.int64))
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in batch.items()}
    with torch.inference_mode():
        found = run_by_shape(inputs, model.dtype, lambda inputs: run(model, inputs))
    return {name: tuple(tensor.shape) for name, tensor in found.items()}
