"""Image pipelines that transformers does not have, or not in separate steps.

They implement the steps of its `Pipeline` and `ChunkPipeline`, so that the adapter runs them like all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.image_utils import load_image
from transformers.pipelines import mask_generation, video_classification
from transformers.pipelines.base import Pipeline

from hfbatch.tasks.vision.masks import distinct

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageToImagePipeline(Pipeline):
    """Upscales images with a model such as Swin2SR.

    Source: the documented use of Swin2SRForImageSuperResolution: the reconstruction, clamped to [0, 1], as bytes.
    """

    _load_processor = _load_feature_extractor = _load_tokenizer = False
    _load_image_processor = True

    def _sanitize_parameters(
        self, crop: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {"crop": crop}

    def preprocess(self, image: Image) -> dict[str, Any]:
        """Returns pixel values, float32 [1, 3, height, width], with the border that the image processor adds."""
        image = load_image(image)
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "size": [image.height, image.width]}

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        size = model_inputs.pop("size")
        pixels = self.model(**model_inputs)["reconstruction"].float().clamp(0, 1).permute(0, 2, 3, 1)
        # Converted to bytes here: a quarter of the data to transfer to postprocess.
        return {"pixels": (pixels * 255).round().byte(), "size": size}

    def postprocess(self, output: Any, crop: bool) -> Image:
        """Returns the image. :param crop: remove the part generated from the border."""
        from PIL import Image

        pixels = output["pixels"][0].numpy()
        if crop:
            height, width = (side * self.model.config.upscale for side in output["size"])
            pixels = pixels[:height, :width]
        return Image.fromarray(pixels)


class KeypointMatchingPipeline(Pipeline):
    """Matches points of two images that show the same place.

    Source: the documented use of SuperGlueForKeypointMatching. The pipeline of transformers 5.23 swaps
    width and height in the image processor, so that its points are correct only for square images; here, for all.
    """

    _load_processor = _load_feature_extractor = _load_tokenizer = False
    _load_image_processor = True

    def _sanitize_parameters(
        self, threshold: float = 0.0
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {"threshold": threshold}

    def preprocess(self, pair: tuple[Image, Image]) -> dict[str, Any]:
        """Returns pixel values, float32 [1, 2, channels, height, width], and the original image sizes."""
        images = [load_image(image) for image in pair]
        made = self.image_processor(images=images, return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "sizes": [(one.height, one.width) for one in images]}

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        sizes = model_inputs.pop("sizes")
        return {**self.model(**model_inputs), "sizes": sizes}

    def postprocess(self, output: Any, threshold: float) -> list[dict[str, Any]]:
        """Matches, best first: `keypoint_image_0`, `keypoint_image_1`, each `x` and `y` in pixels, and `score`."""
        (found,) = self.image_processor.post_process_keypoint_matching(output, [output["sizes"]], threshold)
        sides = ([{"x": x, "y": y} for x, y in found[f"keypoints{k}"].tolist()] for k in (0, 1))
        matches = [
            {"keypoint_image_0": one, "keypoint_image_1": other, "score": score}
            for one, other, score in zip(*sides, found["matching_scores"].tolist(), strict=True)
        ]
        return sorted(matches, key=lambda match: -match["score"])


class MaskGenerationPipeline(mask_generation.MaskGenerationPipeline):
    """transformers' pipeline with the model in one step: computes the embeddings of a crop together with its masks.

    Reimplements the suppression of duplicate masks, for which transformers needs torchvision.
    """

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before, filters, after = super()._sanitize_parameters(**options)
        filters["points_per_batch"] = before.pop("points_per_batch", 64)
        return before, filters, after

    def preprocess(self, image: Image, **grid: Any) -> Iterator[dict[str, Any]]:
        """Yields crops of the image, first the whole image, with the points to prompt the model with.

        :param grid: layout of crops and points, see generate_crop_boxes of the image processor.
        """
        size = self.image_processor.size
        edge = size.get("longest_edge", size.get("height"))
        layout = {
            "crop_n_layers": grid.get("crops_n_layers", 0),
            "overlap_ratio": grid.get("crop_overlap_ratio", 512 / 1500),
            "points_per_crop": grid.get("points_per_crop", 32),
        }
        boxes, points, crops, _ = self.image_processor.generate_crop_boxes(load_image(image), edge, **layout)
        made = self.image_processor(images=crops, return_tensors="pt")
        for k in range(len(crops)):
            yield {
                **{name: value[k : k + 1] for name, value in made.items()},
                # Coordinates need more digits than the model's dtype may have, so they are not float tensors.
                "input_boxes": boxes[k : k + 1].long(),
                "points": points[:, :, k : k + 1].tolist(),
                "full_image_size": made["original_sizes"][0],
                "is_last": k == len(crops) - 1,
            }

    def _forward(self, model_inputs: Any, points_per_batch: int, **filters: Any) -> dict[str, Any]:
        """Returns the masks of a crop that pass the filters, as run lengths."""
        inputs = dict(model_inputs)
        embeddings = self.model.get_image_embeddings(inputs.pop("pixel_values"))
        several = isinstance(embeddings, tuple)  # as for models such as SAM-HQ
        names = ("image_embeddings", "intermediate_embeddings")
        inputs |= dict(zip(names, embeddings if several else (embeddings,), strict=False))
        points = torch.tensor(inputs.pop("points"), dtype=torch.float64, device=inputs["input_boxes"].device)
        found = []
        for part in points.split(points_per_batch, dim=1):
            labels = torch.ones_like(part[..., 0], dtype=torch.long)
            asked = {"input_points": part, "input_labels": labels}
            found.append(super()._forward({**inputs, **asked}, **filters))
        return {
            "masks": [mask for one in found for mask in one["masks"]],
            "boxes": torch.cat([one["boxes"].float() for one in found]),
            "iou_scores": torch.cat([one["iou_scores"] for one in found]),
            "is_last": inputs["is_last"],
        }

    def postprocess(self, steps: list[Any], crops_nms_thresh: float = 0.7) -> list[dict[str, Any]]:
        """Merges the masks of all crops, best first: `score`, `box` in pixels and `mask` as run lengths."""
        masks = [mask for step in steps for mask in step["masks"]]
        boxes = torch.cat([step["boxes"] for step in steps]).numpy()
        scores = torch.cat([step["iou_scores"] for step in steps]).numpy()
        return [
            {"score": float(scores[k]), "box": boxes[k].astype(int).tolist(), "mask": masks[k]}
            for k in distinct(boxes, scores, crops_nms_thresh)
        ]


class VideoClassificationPipeline(video_classification.VideoClassificationPipeline):
    """transformers' pipeline after decoding, with the image processor: video processors need torchvision."""

    def preprocess(self, frames: np.ndarray, **sampling: Any) -> dict[str, Any]:
        """Returns pixel values, float32 [1, frames, channels, height, width]. :param frames: see `to_video`."""
        return dict(self.image_processor(list(frames), return_tensors="pt"))
