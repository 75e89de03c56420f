"""Task visual-question-answering: what a picture says to a question. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_image
from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.pipeline import PipelineTask
from hfbatch.tasks.parts.text import length_faults, text_column
from hfbatch.tasks.parts.vision import IMAGE

ANSWER = pa.struct([("answer", pa.string()), ("score", pa.float32())])
CLASSIFIER, WRITER = "ViltForQuestionAnswering", "BlipForQuestionAnswering"


class VisualQuestionAnsweringParams(Params):
    """How many answers to choose, or how long a written one may be."""

    top_k: int = Field(default=5, ge=1)
    """How many answers of a classifier such as ViLT to return, best first."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that a model such as BLIP writes; null takes the model's own limit, at last 20."""
    num_beams: int | None = Field(default=None, ge=1)
    """Beams of beam search, for models that write; null takes the model's own, at last 1."""


class VisualQuestionAnswering(PipelineTask):
    """The best answers to a question about each picture, or the one that the model writes, always its likeliest."""

    name = "visual-question-answering"
    aliases = ("vqa",)
    summary = "Answers to a question about a picture, by a model such as ViLT or BLIP"
    auto_class = "AutoModelForVisualQuestionAnswering"
    pipeline = "hfbatch.tasks.parts.multimodal.VisualQuestionAnsweringPipeline"
    inputs = (IMAGE, text_column("question"))
    outputs: ClassVar[Mapping[str, str]] = {
        "answers": "list<struct<answer, score>>, best first; a written answer has a null score"
    }
    Params = VisualQuestionAnsweringParams
    split_rows = 256
    concurrent = False
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"image": ["cat.jpg"], "question": ["What is it doing?"]}, {"top_k": 2})

    params: VisualQuestionAnsweringParams

    def options(self) -> dict[str, Any]:
        """The params, and that nothing is drawn at random."""
        return {**super().options(), "do_sample": False}

    def check(self) -> list[str]:
        """Faults: a model of another task, and params that it does not use."""
        from hfbatch.tasks.parts.multimodal import architecture_faults

        instead = "one such as ViLT or BLIP for question answering, or task image-text-to-text"
        faults = architecture_faults(self, (CLASSIFIER, WRITER), instead)
        if faults:
            return faults
        asked = [name for name in ("max_new_tokens", "num_beams") if getattr(self.params, name) is not None]
        if asked and self.config.model_type == "vilt":
            faults.append(f"params: {', '.join(asked)} are for models that write; leave them out")
        drawn = getattr(self.config, "max_image_length", -1)
        if drawn > 0:
            faults.append(
                f"model {self.model.name!r} reads {drawn} patches of a picture, drawn at random; "
                "set max_image_length to -1 in its config.json"
            )
        faults += length_faults(self.max_length, self.tokenizer, self.config)
        return faults or super().check()

    def output_fields(self) -> list[pa.Field]:
        """`answers`: a list of structs."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Pictures, decoded one by one, with their questions."""
        for image, question in zip(columns["image"], columns["question"], strict=True):
            yield {"image": to_image(image.as_py(), self.files), "question": question.as_py()}

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether the question's tokens fill the limit and there are more of them."""
        full = self.limit is not None and steps[0]["input_ids"].shape[-1] >= self.limit
        return full and len(self.tokenizer(row["question"], verbose=False)["input_ids"]) > (self.limit or 0)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best answer of each row; 0 for a written one."""
        return np.array([row[0]["score"] or 0.0 for row in columns[0].to_pylist()])
