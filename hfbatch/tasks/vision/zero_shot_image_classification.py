"""Task zero-shot-image-classification: scores user-defined labels for an image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hfbatch.engines.base import Capability
from hfbatch.tasks.base import Example, Params
from hfbatch.tasks.tokens import length_limit
from hfbatch.tasks.vision.image_classification import ImageClassification
from hfbatch.tasks.vision.image_encoder import FULL_WIDTH, encode_images, encode_texts

if TYPE_CHECKING:
    import torch

COSINE = ("altclip", "chinese_clip", "clip", "metaclip_2", "siglip", "siglip2")
"""Model types whose logits are a scaled and shifted cosine of features: labels are encoded only once."""
SIGMOID_TOKENS = 64
"""Padding of captions for models that score each label independently."""


class ZeroShotImageClassificationParams(Params):
    """The candidate labels and the caption template."""

    candidate_labels: list[str] = Field(min_length=1)
    """Candidate labels."""
    hypothesis_template: str = "This is a photo of {}."
    """The caption that is compared with the image; {} is replaced with the label."""


class ZeroShotImageClassification(ImageClassification):
    """Returns user-defined labels, best first, for each image."""

    name = "zero-shot-image-classification"
    summary = "Scores of labels that you define for an image, by a model such as CLIP"
    auto_class = "AutoModelForZeroShotImageClassification"
    outputs: ClassVar[Mapping[str, str]] = {"label": "list<string>, best first", "score": "list<float32>"}
    Params = ZeroShotImageClassificationParams
    EXAMPLE = Example({"image": ["cat.jpg", "dog.png"]}, {"candidate_labels": ["a cat", "a dog"]})

    params: Any
    _encoded: tuple[Any, torch.Tensor] | None = None

    @cached_property
    def labels(self) -> list[str]:
        """Candidate labels."""
        return self.params.candidate_labels

    @cached_property
    def function(self) -> str:
        """Function applied to logits."""
        return "sigmoid" if self.config.model_type in FULL_WIDTH else "softmax"

    @cached_property
    def count(self) -> int:
        """Number of labels: all of them."""
        return len(self.labels)

    @cached_property
    def captions(self) -> list[str]:
        """Captions that the images are compared with."""
        return [self.params.hypothesis_template.format(label) for label in self.labels]

    def check(self) -> list[str]:
        """Returns errors for a template without {} and for captions that are too long for the model."""
        if "{}" not in self.params.hypothesis_template:
            return [
                f"params.hypothesis_template {self.params.hypothesis_template!r} has no {{}} for the label"
            ]
        limit = length_limit(self.tokenizer, self.config)
        lengths = [len(ids) for ids in self.tokenizer(self.captions)["input_ids"]]
        return super().check() + [
            f"params.candidate_labels: {caption!r} has {length} tokens, the model takes {limit}; shorten it"
            for caption, length in zip(self.captions, lengths, strict=True)
            if limit is not None and length > limit
        ]

    @property
    def asks(self) -> frozenset[Capability]:
        """Also the module, whose towers encode images and captions apart."""
        return super().asks | {Capability.MODULE}

    def logits(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits of each label for each image, [images, labels]."""
        from torch.nn.functional import normalize

        if self.config.model_type not in COSINE:
            return model(**self._tokens(model), **inputs).logits_per_image
        images = normalize(encode_images(model, inputs), dim=-1)
        logits = images @ self._label_vectors(model).T * model.logit_scale.exp()
        return logits + model.logit_bias if hasattr(model, "logit_bias") else logits

    def _label_vectors(self, model: Any) -> torch.Tensor:
        """Returns unit vectors of the captions, [labels, size], cached; concurrent first batches may both compute it."""
        from torch.nn.functional import normalize

        if self._encoded is None or self._encoded[0] is not model:
            self._encoded = model, normalize(encode_texts(model, self._tokens(model)), dim=-1)
        return self._encoded[1]

    def _tokens(self, model: Any) -> Mapping[str, torch.Tensor]:
        options: dict[str, Any] = {"padding": True}
        if self.function == "sigmoid":
            options = {"padding": "max_length", "max_length": SIGMOID_TOKENS, "truncation": True}
        return self.tokenizer(self.captions, return_tensors="pt", **options).to(model.device)
