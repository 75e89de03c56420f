"""Task image-text-to-text: what a model writes for pictures with a prompt or a chat. Knows nothing of files."""

from __future__ import annotations

from hfbatch.tasks.base import Example
from hfbatch.tasks.parts.writing import PromptedTask


class ImageTextToText(PromptedTask):
    """Continues the prompt of `text` about `image`, or answers the chat of `messages` with pictures in it.

    A prompt marks the place of a picture as the model wants it, such as `<image>` for LLaVA; BLIP and GIT want no
    mark. A chat goes through the processor's chat template; one that ends with the assistant is continued.
    """

    name = "image-text-to-text"
    summary = "What a model such as LLaVA or BLIP writes for pictures with a prompt or a chat"
    auto_class = "AutoModelForImageTextToText"
    pipeline = "hfbatch.tasks.parts.multimodal.ImagePromptPipeline"
    EXAMPLE = Example(
        {
            "image": ["cat.jpg"],
            "messages": [[{"role": "user", "content": "What is in the picture?"}]],
        },
        {"max_new_tokens": 32},
    )

    def check(self) -> list[str]:
        """Faults: a model of another task, and params that contradict each other."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

        from hfbatch.tasks.parts.multimodal import architecture_faults

        fits = set(NAMES.values()) - {"VisionEncoderDecoderModel"}
        instead = "one such as LLaVA, BLIP or GIT; task image-to-text takes pictures without a prompt"
        return architecture_faults(self, fits, instead) or super().check()
