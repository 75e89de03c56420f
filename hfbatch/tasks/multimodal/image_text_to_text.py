"""Task image-text-to-text: generates text from images with a prompt or a chat."""

from __future__ import annotations

from hfbatch.tasks.base import Example
from hfbatch.tasks.multimodal.multimodal_generation import PromptedTask


class ImageTextToText(PromptedTask):
    """Continues the prompt of `text` about `image`, or answers the chat of `messages` with images in it.

    A prompt marks the position of an image with the model's placeholder, such as `<image>` for LLaVA; BLIP and GIT
    have none. A chat is rendered with the processor's chat template; if it ends with an assistant message, that
    message is continued.
    """

    name = "image-text-to-text"
    summary = "Text generated from images with a prompt or a chat, by a model such as LLaVA or BLIP"
    auto_class = "AutoModelForImageTextToText"
    pipeline = "hfbatch.tasks.pipelines.replacements.ImagePromptPipeline"
    EXAMPLE = Example(
        {
            "image": ["cat.jpg"],
            "messages": [[{"role": "user", "content": "What is in the image?"}]],
        },
        {"max_new_tokens": 32},
    )

    def check(self) -> list[str]:
        """Returns errors for a model of another task, and for contradictory params."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

        from hfbatch.tasks.pipelines.replacements import architecture_faults

        fits = set(NAMES.values()) - {"VisionEncoderDecoderModel"}
        instead = "one such as LLaVA, BLIP or GIT; task image-to-text takes images without a prompt"
        return architecture_faults(self, fits, instead) or super().check()
