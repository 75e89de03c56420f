"""Images as model inputs: resized and cropped as bytes on the CPU, normalized on the device.

An image processor of transformers rescales and normalizes resized images, which makes the data to transfer four
times as large. If normalizing on the device gives the same result, these steps are disabled in the processor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Batch
from hfbatch.tasks.tokens import flatten, list_lengths, offsets_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from hfbatch.hub.models import Model

PIXELS, SHAPE = "pixel_values", "/shape"
PLACES, SCALE, SHIFT = "places", "scale", "shift"
EARLY = {"do_rescale": False, "do_normalize": False}
TRIED_SIZES = ((37, 53), (400, 300), (260, 700))
"""Heights and widths of the images that a processor is tested with."""


def load_image_processor(model: Model) -> Any:
    """Loads the model's image processor with the Pillow backend: the same pixels on every machine."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(
        model.folder, backend="pil", trust_remote_code=model.trust_remote_code
    )


class Pixels:
    """A model's image processor, restricted to the steps on bytes if possible."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def processor(self) -> Any:
        """The image processor."""
        return load_image_processor(self._model)

    @cached_property
    def in_bytes(self) -> bool:
        """Whether images are transferred as bytes, and rescaled and normalized on the device."""
        return can_stop_early(self.processor)

    def features(self, images: Iterable[Image]) -> pa.Table:
        """Processes images; returns every model input flattened, and its shape.

        Pixels are uint8 if `in_bytes`, else as the processor returns them.
        """
        made = [as_arrays(self.processor(one, **(EARLY if self.in_bytes else {}))) for one in images]
        columns = {}
        for name in made[0] if made else ():
            arrays = [one[name] for one in made]
            columns[name] = _as_lists(arrays)
            columns[name + SHAPE] = pa.array([array.shape for array in arrays], pa.list_(pa.int32()))
        return pa.table(columns)

    def collate(self, features: pa.Table, rows: np.ndarray) -> Batch:
        """Stacks rows of equal shapes into one array each, for `run_by_shape`.

        :returns: `0/pixel_values` [images, ...] and the like; `places` int64 [batch], the position in the
            batch of the images of all arrays, in order; for bytes, `scale` and `shift`, see `scaling`. They are part
            of the batch because it is copied to the device while another one computes.
        """
        names = names_in(features)
        shapes = {name: features[name + SHAPE].take(pa.array(rows)).to_pylist() for name in names}
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place in range(len(rows)):
            alike[tuple(tuple(shapes[name][place]) for name in names)].append(place)
        batch: Batch = {PLACES: np.concatenate(list(alike.values())).astype(np.int64)}
        if self.in_bytes:
            batch[SCALE], batch[SHIFT] = scaling(self.processor)
        for group, (key, places) in enumerate(alike.items()):
            for name, shape in zip(names, key, strict=True):
                batch[f"{group}/{name}"] = _stack(features[name], rows[places], shape)
        return batch


def run_by_shape(
    batch: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Calls run on the model inputs of each shape; returns the results in batch order.

    :param batch: see `Pixels.collate`.
    :param dtype: dtype of floating-point inputs.
    :param run: maps model inputs to tensors of first dimension images; ragged ones padded on the right.
    """
    groups: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in batch.items():
        group, _, name = key.partition("/")
        if name:
            if name == PIXELS and SCALE in batch:
                tensor = tensor.float().mul_(batch[SCALE]).sub_(batch[SHIFT])
            groups[group][name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    parts = [run(inputs) for inputs in groups.values()]
    if len(parts) == 1:
        return parts[0]
    back = batch[PLACES].argsort()
    return {name: _join([part[name] for part in parts])[back] for name in parts[0]}


def names_in(features: pa.Table) -> list[str]:
    """Returns the names of the model inputs in features."""
    return [name.removesuffix(SHAPE) for name in features.column_names if name.endswith(SHAPE)]


def sizes_of(features: pa.Table) -> np.ndarray:
    """Returns the number of elements in the model inputs of each image, int64 [rows]."""
    return sum(
        (list_lengths(features[name]) for name in names_in(features)), np.zeros(len(features), np.int64)
    )


def size_of(batch: Batch) -> int:
    """Returns the total of `sizes_of` over all images in a batch."""
    return sum(int(array.size) for name, array in batch.items() if "/" in name)


def scaling(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale and shift that rescale and normalize bytes: float32 [channels or 1, 1, 1]."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (np.array(values, np.float64).reshape(-1, 1, 1) for values in (mean, std))
    return (factor / std).astype(np.float32), (mean / std).astype(np.float32)


def can_stop_early(processor: Any) -> bool:
    """Whether the processor's bytes, with the scale and shift of `scaling`, equal its default output.

    Tested on noise instead of read from the settings: some processors rescale before they resize, add an offset,
    or ignore these options.
    """
    random = np.random.default_rng(0)
    return all(_same_early(processor, random.integers(0, 256, (*size, 3), np.uint8)) for size in TRIED_SIZES)


def shape_of(processor: Any, height: int, width: int) -> tuple[int, ...]:
    """Returns the shape of a processor's output for an image of the given size."""
    from PIL import Image

    return as_arrays(processor(Image.new("RGB", (width, height))))[PIXELS].shape


def _same_early(processor: Any, pixels: np.ndarray) -> bool:
    from PIL import Image

    try:
        whole, early = (as_arrays(processor(Image.fromarray(pixels), **options)) for options in ({}, EARLY))
        scale, shift = scaling(processor)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    if list(whole) != list(early) or early.get(PIXELS, np.empty(0)).dtype != np.uint8:
        return False
    early[PIXELS] = early[PIXELS] * scale - shift
    return all(
        whole[name].shape == early[name].shape and np.allclose(whole[name], early[name], rtol=0, atol=1e-5)
        for name in whole
    )


def as_arrays(made: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a processor's output for one image, without the batch dimension."""
    return {name: np.asarray(value[0]) for name, value in made.items()}


def _as_lists(arrays: list[np.ndarray]) -> pa.LargeListArray:
    """Converts arrays to one flat list each."""
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int64)
    values = np.concatenate([array.ravel() for array in arrays])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _stack(column: pa.ChunkedArray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Stacks lists of equal length into an array [rows, *shape]."""
    lists = flatten(column)
    offsets, values = offsets_of(lists), lists.values.to_numpy()
    return np.stack([values[offsets[row] : offsets[row + 1]] for row in rows]).reshape(len(rows), *shape)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates results of several shapes; pads the second dimension on the right if it differs."""
    import torch
    from torch.nn.functional import pad

    if parts[0].ndim < 3:
        return torch.cat(parts)
    most = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.ndim - 2) + (0, most - part.shape[1])) for part in parts])
