"""Task zero-shot-image-classification: scores of labels that the user names. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.image_classification import ImageClassification
from hfbatch.tasks.parts.image_encoder import FULL_WIDTH, encode_pictures, encode_texts
from hfbatch.tasks.parts.text import length_limit

if TYPE_CHECKING:
    import torch

COSINE = ("altclip", "chinese_clip", "clip", "metaclip_2", "siglip", "siglip2")
"""Types of models whose logits are a cosine of features, scaled and shifted: they encode the labels once."""
SIGMOID_TOKENS = 64
"""What captions are padded to for models that score each label for itself."""


class ZeroShotImageClassificationParams(Params):
    """The labels, and how they are put to the model."""

    candidate_labels: list[str] = Field(min_length=1)
    """The labels to choose among."""
    hypothesis_template: str = "This is a photo of {}."
    """The caption that is compared with the picture, with the label in place of {}."""


class ZeroShotImageClassification(ImageClassification):
    """Labels named by the user, best first, for each picture."""

    name = "zero-shot-image-classification"
    summary = "Scores of labels that you name for a picture, by a model such as CLIP"
    auto_class = "AutoModelForZeroShotImageClassification"
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = ZeroShotImageClassificationParams
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"candidate_labels": ["a cat", "a dog"]})

    params: Any
    _encoded: tuple[Any, torch.Tensor] | None = None

    @cached_property
    def labels(self) -> list[str]:
        """The labels to choose among."""
        return self.params.candidate_labels

    @cached_property
    def function(self) -> str:
        """What turns logits into scores."""
        return "sigmoid" if self.config.model_type in FULL_WIDTH else "softmax"

    @cached_property
    def count(self) -> int:
        """All labels."""
        return len(self.labels)

    @cached_property
    def captions(self) -> list[str]:
        """What the pictures are compared with."""
        return [self.params.hypothesis_template.format(label) for label in self.labels]

    def check(self) -> list[str]:
        """Faults: a template without a place for the label, and captions that are too long for the model."""
        if "{}" not in self.params.hypothesis_template:
            return [
                f"params.hypothesis_template {self.params.hypothesis_template!r} has no {{}}, the label's place"
            ]
        limit = length_limit(self.tokenizer, self.config)
        lengths = [len(ids) for ids in self.tokenizer(self.captions)["input_ids"]]
        return super().check() + [
            f"params.candidate_labels: {caption!r} has {length} tokens, the model takes {limit}; shorten it"
            for caption, length in zip(self.captions, lengths, strict=True)
            if limit is not None and length > limit
        ]

    def logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """How well each label fits each picture, [pictures, labels]."""
        from torch.nn.functional import normalize

        if self.config.model_type not in COSINE:
            return model(**self._tokens(model), **inputs).logits_per_image
        pictures = normalize(encode_pictures(model, inputs), dim=-1)
        logits = pictures @ self._label_vectors(model).T * model.logit_scale.exp()
        return logits + model.logit_bias if hasattr(model, "logit_bias") else logits

    def _label_vectors(self, model: Any) -> torch.Tensor:
        """Features of the captions, of length 1: [labels, size]. Computed once; twice if two batches begin at once."""
        from torch.nn.functional import normalize

        if self._encoded is None or self._encoded[0] is not model:
            self._encoded = model, normalize(encode_texts(model, self._tokens(model)), dim=-1)
        return self._encoded[1]

    def _tokens(self, model: Any) -> Mapping[str, torch.Tensor]:
        options: dict[str, Any] = {"padding": True}
        if self.function == "sigmoid":
            options = {"padding": "max_length", "max_length": SIGMOID_TOKENS, "truncation": True}
        return self.tokenizer(self.captions, return_tensors="pt", **options).to(model.device)
