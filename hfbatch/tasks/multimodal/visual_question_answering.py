"""Task visual-question-answering: answers questions about an image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_image
from hfbatch.tasks.answer_agreement import Best
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.pipelines.pipeline import PipelineTask
from hfbatch.tasks.tokens import length_faults, text_column
from hfbatch.tasks.vision.vision import IMAGE

ANSWER = pa.struct([("answer", pa.string()), ("score", pa.float32())])
CLASSIFIER, WRITER = "ViltForQuestionAnswering", "BlipForQuestionAnswering"


class VisualQuestionAnsweringParams(Params):
    """Options for the number of answers, or the length of a generated answer."""

    top_k: int = Field(default=5, ge=1)
    """Number of answers of a classifier such as ViLT to return, best first."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens that a model such as BLIP generates; null uses the model's limit, else 20."""
    num_beams: int | None = Field(default=None, ge=1)
    """Number of beams, for generative models; null uses the model's setting, else 1."""


class VisualQuestionAnswering(PipelineTask):
    """Returns the best answers to a question about each image, or the most probable generated answer."""

    name = "visual-question-answering"
    aliases = ("vqa",)
    summary = "Answers to a question about an image, by a model such as ViLT or BLIP"
    auto_class = "AutoModelForVisualQuestionAnswering"
    pipeline = "hfbatch.tasks.pipelines.replacements.VisualQuestionAnsweringPipeline"
    inputs = (IMAGE, text_column("question"))
    outputs: ClassVar[Mapping[str, str]] = {
        "answers": "list<struct<answer, score>>, best first; a generated answer has a null score"
    }
    Params = VisualQuestionAnsweringParams
    split_rows = 256
    concurrent = False
    agreement = Best("answers")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"image": ["cat.jpg"], "question": ["What is it doing?"]}, {"top_k": 2})

    params: VisualQuestionAnsweringParams

    def options(self) -> dict[str, Any]:
        """Returns the params, with sampling disabled."""
        return {**super().options(), "do_sample": False}

    def check(self) -> list[str]:
        """Returns errors for a model of another task, and for unused params."""
        from hfbatch.tasks.pipelines.replacements import architecture_faults

        instead = "one such as ViLT or BLIP for question answering, or task image-text-to-text"
        faults = architecture_faults(self, (CLASSIFIER, WRITER), instead)
        if faults:
            return faults
        asked = [name for name in ("max_new_tokens", "num_beams") if getattr(self.params, name) is not None]
        if asked and self.config.model_type == "vilt":
            faults.append(f"params: {', '.join(asked)} are for generative models; leave them out")
        drawn = getattr(self.config, "max_image_length", -1)
        if drawn > 0:
            faults.append(
                f"model {self.model.name!r} reads {drawn} patches of an image, chosen at random; "
                "set max_image_length to -1 in its config.json"
            )
        faults += length_faults(self.max_length, self.tokenizer, self.config)
        return faults or super().check()

    def output_fields(self) -> list[pa.Field]:
        """`answers`: a list of structs."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Yields images, decoded one by one, with their questions."""
        for image, question in zip(columns["image"], columns["question"], strict=True):
            yield {"image": to_image(image.as_py(), self.files), "question": question.as_py()}

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether the question exceeds the limit."""
        full = self.limit is not None and steps[0]["input_ids"].shape[-1] >= self.limit
        return full and len(self.tokenizer(row["question"], verbose=False)["input_ids"]) > (self.limit or 0)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best answer of each row; 0 for a generated answer."""
        return np.array([row[0]["score"] or 0.0 for row in columns[0].to_pylist()])
