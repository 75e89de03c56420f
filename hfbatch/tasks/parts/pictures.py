"""Pipelines over pictures that transformers does not have: super-resolution, dropped in version 5.

They have the steps of its `Pipeline`, so that the adapter runs them as it runs all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.image_utils import load_image
from transformers.pipelines.base import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageToImagePipeline(Pipeline):
    """Pictures made larger, by a model such as Swin2SR.

    Source: the documented use of Swin2SRForImageSuperResolution: its reconstruction, clamped to [0, 1], as bytes.
    """

    _load_processor = _load_feature_extractor = _load_tokenizer = False
    _load_image_processor = True

    def _sanitize_parameters(
        self, crop: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {"crop": crop}

    def preprocess(self, image: Image) -> dict[str, Any]:
        """Pixel values, float32 [1, 3, height, width], with the border that the image processor adds."""
        image = load_image(image)
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "size": [image.height, image.width]}

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        size = model_inputs.pop("size")
        pixels = self.model(**model_inputs)["reconstruction"].float().clamp(0, 1).permute(0, 2, 3, 1)
        # Bytes already here: a quarter of what travels to postprocess.
        return {"pixels": (pixels * 255).round().byte(), "size": size}

    def postprocess(self, output: Any, crop: bool) -> Image:
        """The picture. :param crop: without the part that was made of the border."""
        from PIL import Image

        pixels = output["pixels"][0].numpy()
        if crop:
            height, width = (side * self.model.config.upscale for side in output["size"])
            pixels = pixels[:height, :width]
        return Image.fromarray(pixels)
