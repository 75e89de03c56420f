"""Cases of the tasks over images."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline

from tests.cases.case import Answer, Case, columns_of
from tests.models.vision import tiny_vision

LABELS = ["weather", "work", "mathematics of the night"]
NAMES = {0: "cat", 1: "dog", 2: "tram"}


def image_files(count: int = 22, seed: int = 0) -> list[bytes]:
    """Images of mixed sizes, modes and formats, as files."""
    random = np.random.default_rng(seed)
    files = []
    for k in range(count):
        height, width = random.integers(20, 60, 2)
        pixels = random.integers(0, 255, (height, width, 3), np.uint8)
        image = Image.fromarray(pixels).convert("L" if k % 5 == 4 else "RGB")
        target = BytesIO()
        image.save(target, "JPEG" if k % 3 == 2 else "PNG")
        files.append(target.getvalue())
    return files


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    target = BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def image_file(row: Any, name: str = "image") -> Image.Image:
    """A row's image, decoded."""
    return Image.open(BytesIO(row[name]))


def piped(task: str, answer: Callable[[Any], Any], **options: Any) -> Callable[[str], Answer]:
    """The task's pipeline over each image alone; `answer` makes output columns of what it returns."""

    def load(folder: str) -> Answer:
        pipe = pipeline(task, folder, device="cpu")
        return lambda row: answer(pipe(image_file(row), **options))

    return load


def case(architecture: str, oracle: Callable[[str], Answer], **params: Any) -> Case:
    """A case over images of mixed sizes."""
    return Case(
        lambda folder: tiny_vision(folder, architecture, id2label=NAMES),
        {"image": image_files()},
        oracle,
        params,
        unreadable=b"this is no picture",
    )


CASES = {
    "image-classification": case(
        "ViTForImageClassification", piped("image-classification", columns_of, top_k=2), top_k=2
    ),
    "image-feature-extraction": case(
        "Dinov2Model",
        piped("image-feature-extraction", lambda found: {"features": found[0]}, pool=True),
        pool=True,
    ),
    "object-detection": case(
        "YolosForObjectDetection",
        piped("object-detection", lambda found: {"objects": found}, threshold=0.3),
        threshold=0.3,
    ),
    "depth-estimation": case(
        "DPTForDepthEstimation",
        piped(
            "depth-estimation",
            lambda found: {
                "predicted_depth": found["predicted_depth"].tolist(),
                "depth": png(found["depth"]),
            },
        ),
    ),
    "image-segmentation": case(
        "SegformerForSemanticSegmentation",
        piped(
            "image-segmentation",
            lambda found: {"segments": [{**one, "mask": png(one["mask"])} for one in found]},
        ),
    ),
    "zero-shot-image-classification": case(
        "CLIPModel",
        piped("zero-shot-image-classification", columns_of, candidate_labels=LABELS),
        candidate_labels=LABELS,
    ),
    "zero-shot-object-detection": case(
        "OwlViTForObjectDetection",
        piped(
            "zero-shot-object-detection",
            lambda found: {"objects": found},
            candidate_labels=LABELS,
            threshold=0.05,
            top_k=4,
        ),
        candidate_labels=LABELS,
        threshold=0.05,
        top_k=4,
    ),
}
