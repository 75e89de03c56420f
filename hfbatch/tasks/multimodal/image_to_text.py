"""Task image-to-text: generates a caption of an image, or reads the text in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from hfbatch.data.media import to_image
from hfbatch.tasks.base import Example
from hfbatch.tasks.multimodal.multimodal_generation import MultimodalGenerationTask
from hfbatch.tasks.vision.vision import IMAGE

CAPTIONERS = (
    *("BlipForConditionalGeneration", "GitForCausalLM", "VisionEncoderDecoderModel"),
    "Pix2StructForConditionalGeneration",
)
"""Model classes that generate text without a prompt."""


class ImageToText(MultimodalGenerationTask):
    """Returns a caption of each image, or the text in it, from a model that takes no prompt."""

    name = "image-to-text"
    summary = "A caption of an image, or the text in it, by a model such as BLIP, GIT or TrOCR"
    general = False
    auto_class = "AutoModelForImageTextToText"
    pipeline = "hfbatch.tasks.pipelines.replacements.CaptionPipeline"
    inputs = (IMAGE,)
    EXAMPLE = Example({"image": ["cat.jpg", "line.png"]}, {"max_new_tokens": 20})

    def check(self) -> list[str]:
        """Returns errors for a model that needs a prompt, and for contradictory params."""
        from hfbatch.tasks.pipelines.replacements import architecture_faults

        instead = "one such as BLIP, GIT or TrOCR, or task image-text-to-text with a prompt"
        return architecture_faults(self, CAPTIONERS, instead) or super().check()

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields images, decoded one by one."""
        for value in columns["image"]:
            yield to_image(value.as_py(), self.files)
