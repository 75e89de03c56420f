"""Cases of the tasks that make images, masks or matches, and of videos."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForKeypointMatching,
    Swin2SRForImageSuperResolution,
    pipeline,
)

from tests.cases.case import Answer, Case, columns_of
from tests.cases.vision import png
from tests.models.images import image_files, opened, tiny_matcher, tiny_sam, tiny_swin2sr
from tests.models.video import moving, tiny_videomae, video_file
from tests.tasks.test_keypoint_matching import matches_of
from tests.tasks.test_mask_generation import LOOSE, expected_of


def image_to_image(folder: str) -> Answer:
    """The documented use of Swin2SR."""
    from PIL import Image

    model = Swin2SRForImageSuperResolution.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def answer(row: Any) -> dict[str, Any]:
        inputs = processor(opened(row["image"]).convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            values = model(**inputs).reconstruction[0].clamp(0, 1).movedim(0, -1).numpy()
        return {"generated_image": png(Image.fromarray((values * 255.0).round().astype(np.uint8)))}

    return answer


MASKS = {**LOOSE, "points_per_crop": 4, "mask_threshold": 0.3}


def mask_generation(folder: str) -> Answer:
    found = dict(zip(IMAGES, expected_of(folder, IMAGES, **MASKS), strict=True))
    sides = ("xmin", "ymin", "xmax", "ymax")

    def answer(row: Any) -> dict[str, Any]:
        masks = [
            {"score": one["score"], "box": dict(zip(sides, one["box"], strict=True)), "mask": one["rle"]}
            for one in found[row["image"]]
        ]
        return {"masks": masks}

    return answer


def keypoint_matching(folder: str) -> Answer:
    model = AutoModelForKeypointMatching.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    names = ("keypoint_image_0", "keypoint_image_1")

    def answer(row: Any) -> dict[str, Any]:
        found = matches_of(model, processor, (row["image_0"], row["image_1"]), 0.1)
        points = [{name: {"x": one[k][0], "y": one[k][1]} for k, name in enumerate(names)} for one in found]
        return {"matches": [{**two, "score": one[2]} for two, one in zip(points, found, strict=True)]}

    return answer


def video_classification(folder: str) -> Answer:
    pipe = pipeline("video-classification", folder, device="cpu", top_k=3)

    def answer(row: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "film")
            path.write_bytes(row["video"])
            return columns_of(pipe(str(path)))

    return answer


PAIRS, IMAGES = image_files(44), image_files()

CASES = {
    "image-to-image": Case(
        tiny_swin2sr, {"image": image_files(22)}, image_to_image, unreadable=b"this is no picture"
    ),
    "mask-generation": Case(
        tiny_sam,
        {"image": IMAGES},
        mask_generation,
        {**MASKS, "mask_format": "rle"},
        unreadable=b"this is no picture",
    ),
    "keypoint-matching": Case(
        lambda folder: tiny_matcher(folder, "SuperGlue"),
        {"image_0": PAIRS[:22], "image_1": PAIRS[22:]},
        keypoint_matching,
        {"threshold": 0.1},
        unreadable=b"this is no picture",
    ),
    "video-classification": Case(
        tiny_videomae,
        {"video": [video_file(moving(6 + k % 5, k, 32 + 8 * (k % 3))) for k in range(22)]},
        video_classification,
        {"top_k": 3},
        unreadable=b"this is no video",
    ),
}
