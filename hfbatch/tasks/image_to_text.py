"""Task image-to-text: a caption of a picture, or the text in it. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from hfbatch.data.media import to_image
from hfbatch.tasks.base import Example
from hfbatch.tasks.parts.vision import IMAGE
from hfbatch.tasks.parts.writing import WritingTask

CAPTIONERS = (
    *("BlipForConditionalGeneration", "GitForCausalLM", "VisionEncoderDecoderModel"),
    "Pix2StructForConditionalGeneration",
)
"""Model classes that write without a prompt."""


class ImageToText(WritingTask):
    """A caption of each picture, or what is written in it, by a model that takes no prompt."""

    name = "image-to-text"
    summary = "A caption of a picture, or the text in it, by a model such as BLIP, GIT or TrOCR"
    general = False
    auto_class = "AutoModelForImageTextToText"
    pipeline = "hfbatch.tasks.parts.multimodal.CaptionPipeline"
    inputs = (IMAGE,)
    EXAMPLE = Example({"image": ["cat.jpg", "line.png"]}, {"max_new_tokens": 20})

    def check(self) -> list[str]:
        """Faults: a model that needs a prompt, and params that contradict each other."""
        from hfbatch.tasks.parts.multimodal import architecture_faults

        instead = "one such as BLIP, GIT or TrOCR, or task image-text-to-text with a prompt"
        return architecture_faults(self, CAPTIONERS, instead) or super().check()

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Pictures, decoded one by one."""
        for value in columns["image"]:
            yield to_image(value.as_py(), self.files)
