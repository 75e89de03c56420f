"""Task zero-shot-classification: scores of labels that the user names, by a model of entailment. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.pipeline import TextPipelineTask
from hfbatch.tasks.parts.text import flatten


class ZeroShotClassificationParams(Params):
    """The labels, and how they are put to the model."""

    candidate_labels: list[str] = Field(min_length=1)
    """The labels to choose among."""
    hypothesis_template: str = "This example is {}."
    """The sentence that the model judges, with the label in place of {}."""
    multi_label: bool = False
    """Score each label for itself (true), or make the scores of all sum to 1 (false)."""


class ZeroShotClassification(TextPipelineTask):
    """Labels named by the user, best first, for each text."""

    name = "zero-shot-classification"
    general = False
    summary = "Scores of labels that you name, without training"
    auto_class = "AutoModelForSequenceClassification"
    pipeline = "zero_shot_classification.ZeroShotClassificationPipeline"
    keeps = ("logits", "candidate_label", "sequence", "is_last")
    outputs: ClassVar[Mapping[str, str]] = {
        "labels": "list<string>, best first",
        "scores": "list<float32>",
    }
    Params = ZeroShotClassificationParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example(
        {"text": ["The match ended in a draw.", "Shares fell."]}, {"candidate_labels": ["sports", "business"]}
    )

    params: ZeroShotClassificationParams

    def output_fields(self) -> list[pa.Field]:
        """`labels` and `scores`, lists of one length."""
        return [pa.field("labels", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32()))]

    def whole(self, row: Any) -> int:
        """Tokens of a text with its longest hypothesis."""
        template = self.params.hypothesis_template
        return max(
            len(self.tokenizer(row, template.format(label), verbose=False)["input_ids"])
            for label in self.params.candidate_labels
        )

    def answer(self, result: Any) -> tuple[Any, ...]:
        """Labels and scores apart."""
        return result["labels"], result["scores"]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        scores = flatten(columns[1])
        return scores.values.to_numpy()[scores.offsets.to_numpy()[:-1]]
