"""Task image-feature-extraction: returns a vector for each patch of an image, or one for the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.data.filesystem import one_line
from hfbatch.tasks.agreement import Vectors
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.tokens import flatten, list_lengths
from hfbatch.tasks.vision.vision import PixelTask, shapes_of

if TYPE_CHECKING:
    import torch


class ImageFeatureExtractionParams(Params):
    """Options for the returned vectors."""

    pool: bool = False
    """Return the model's vector for the whole image (`pooler_output`) instead of all vectors of the last layer."""


class ImageFeatureExtraction(PixelTask):
    """Returns the model's vector for each patch of an image, or for the whole image."""

    name = "image-feature-extraction"
    general = False
    summary = "A vector for each patch of an image, or one for the whole image"
    auto_class = "AutoModel"
    outputs: ClassVar[Mapping[str, str]] = {
        "features": "list over patches of fixed-size list of float32; with pool, one fixed-size list"
    }
    Params = ImageFeatureExtractionParams
    ragged: ClassVar[Mapping[str, str]] = {"features": "length"}
    agreement = Vectors("features")
    histogram = Histogram("vectors", tuple(float(2**k) for k in range(16)))
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"pool": True})

    params: ImageFeatureExtractionParams

    @property
    def unused(self) -> tuple[str, ...]:
        """The pooler, if its vector is not requested."""
        return () if self.params.pool else super().unused

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features of one image."""
        return next(iter(shapes_of(self, self.pixels, self.run).values()))[1:]

    def check(self) -> list[str]:
        """Returns errors for a model that does not run on images only, or does not return such vectors."""
        where = f"model {self.model.name!r}"
        try:
            rank = len(self.shape)
        except KeyError:
            return [f"{where} has no vector for a whole image (pooler_output); set params.pool to false"]
        except (RuntimeError, TypeError, ValueError) as error:
            return [
                f"{where} does not run on images only ({one_line(error)}); for one such as CLIP use task embedding"
            ]
        if rank != (1 if self.params.pool else 2):
            return [f"{where} gives features of shape {self.shape}, not vectors; set params.pool to true"]
        return super().check()

    def output_fields(self) -> list[pa.Field]:
        """`features`: list<fixed_size_list<float32>[size]>, or fixed_size_list<float32>[size] with pool."""
        vector = pa.list_(pa.float32(), self.shape[-1])
        return [pa.field("features", vector if self.params.pool else pa.list_(vector))]

    def run(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `features` float32 [images, vectors, size], `length` int32 [images]; or `pooled` [images, size]."""
        import torch

        output = model(**inputs)
        if self.params.pool:
            return {"pooled": output["pooler_output"].flatten(1).float()}
        features = output[0].float().contiguous()
        length = torch.full((len(features),), features.shape[1], dtype=torch.int32, device=features.device)
        return {"features": features, "length": length}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the vectors unchanged."""
        return [flatten(outputs["pooled" if self.params.pool else "features"])]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of vectors per image."""
        return np.ones(len(outputs)) if self.params.pool else list_lengths(outputs["features"])
