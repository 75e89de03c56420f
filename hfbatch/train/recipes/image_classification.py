"""Training image-classification: one label, several labels, or a number for an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hfbatch.tasks.vision.pixels import PIXELS, TRIED_SIZES, scaling, shape_of
from hfbatch.tasks.vision.vision import IMAGE, decoded
from hfbatch.train.recipes.labels import LABEL, LabelRecipe, LabelTraining
from hfbatch.train.recipes.media import unreadable

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.vision.image_classification import ImageClassification


class ImageClassificationTraining(LabelTraining):
    """How labels are read, and image augmentation."""

    flip: bool = False
    """Flip each image horizontally with probability 0.5; not for digits, letters and maps."""


class ImageClassificationRecipe(LabelRecipe):
    """Trains image classification; all images are resized to one size."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    columns = (IMAGE, LABEL)
    Params = ImageClassificationTraining
    params: ImageClassificationTraining
    task: ImageClassification

    @property
    def processor(self) -> Any:
        """The image processor."""
        return self.task.pixels.processor

    def check(self) -> list[str]:
        """Checks that the image processor returns images of one size, since others cannot be batched."""
        sizes = {shape_of(self.processor, *size) for size in TRIED_SIZES}
        if len(sizes) == 1:
            return super().check()
        shown = " and ".join("×".join(map(str, size)) for size in sorted(sizes))
        return [
            f"the image processor of model {self.task.model.name!r} returns images of several sizes, such as {shown}; "
            "set size to {height, width}, or do_center_crop to true, in its preprocessor_config.json"
        ]

    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """Finds images that are null or cannot be decoded."""
        return unreadable("image", columns["image"], lambda one: decoded(one, self.task.files))

    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Returns `pixel_values` [batch, channels, height, width]: uint8, rescaled on the device, see `prepare`."""
        import torch

        made = self.task.collate(features, np.arange(len(features)), 1)
        return {
            name.partition("/")[2]: torch.from_numpy(value) for name, value in made.items() if "/" in name
        }

    def prepare(self, model: Any) -> None:
        """Registers a hook that rescales, normalises and, in training, flips images on the model's device."""
        import torch

        scale = shift = None
        if self.task.pixels.in_bytes:
            scale, shift = (torch.from_numpy(values) for values in scaling(self.processor))

        def ready(pixels: torch.Tensor, training: bool) -> torch.Tensor:
            """Returns images as the model takes them, float32 [batch, channels, height, width]."""
            if scale is not None and shift is not None:
                pixels = pixels.float() * scale.to(pixels.device) - shift.to(pixels.device)
            if self.params.flip and training:
                chosen = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
                pixels = torch.where(chosen, pixels.flip(-1), pixels)
            return pixels

        def hook(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            """Prepares the images in the arguments of the base model's forward: by name, or the first argument."""
            if PIXELS in named:
                return args, {**named, PIXELS: ready(named[PIXELS], module.training)}
            return (ready(args[0], module.training), *args[1:]), named

        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
