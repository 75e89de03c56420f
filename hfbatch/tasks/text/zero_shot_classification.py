"""Task zero-shot-classification: scores user-defined labels with an entailment model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Labels
from hfbatch.tasks.base import Example, Features, Histogram, InputColumn, Params
from hfbatch.tasks.labels import best_scores
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.windows import TOKENS, any_of, nest, pair_up
from hfbatch.tasks.tokens import flatten, is_words, list_lengths, lists_of, text_column

if TYPE_CHECKING:
    import torch


class ZeroShotClassificationParams(Params):
    """The candidate labels and the hypothesis template."""

    candidate_labels: list[str] | None = Field(default=None, min_length=1)
    """Candidate labels; a column `candidate_labels` takes precedence."""
    hypothesis_template: str = "This example is {}."
    """The hypothesis for the entailment model; {} is replaced with the label."""
    multi_label: bool = False
    """Score each label independently (true), or normalize the scores to sum to 1 (false)."""


class ZeroShotClassification(EncoderTask):
    """Returns user-defined labels, best first, for each text.

    The model scores each pair of text and label, and a text is tokenized once for all its labels.
    """

    name = "zero-shot-classification"
    general = False
    summary = "Scores of labels that you define, without training"
    auto_class = "AutoModelForSequenceClassification"
    inputs = (
        text_column("text"),
        InputColumn("candidate_labels", is_words, "list<string>", required=False),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "labels": "list<string>, best first",
        "scores": "list<float32>",
    }
    Params = ZeroShotClassificationParams
    split_rows = 2048
    windows = TOKENS
    agreement = Labels("labels", "scores")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example(
        {"text": ["The match ended in a draw.", "Shares fell."]}, {"candidate_labels": ["sports", "business"]}
    )

    params: ZeroShotClassificationParams

    @cached_property
    def entailment(self) -> int:
        """The class index of entailment; the last class if the config does not name it."""
        found = [place for name, place in self.config.label2id.items() if name.lower().startswith("entail")]
        return found[0] if found else -1

    @property
    def own_agreement(self) -> Labels:
        """With `multi_label`, or a single label, scores do not exclude each other."""
        alone = self.params.multi_label or len(self.params.candidate_labels or ()) == 1
        return Labels("labels", "scores", "sigmoid" if alone else "softmax")

    def check(self) -> list[str]:
        """Also returns an error for an invalid template."""
        template, faults = self.params.hypothesis_template, super().check()
        try:
            fixed = template.format("label") == template
        except (IndexError, KeyError, ValueError):
            fixed = True
        if fixed:
            faults.append(
                f"params.hypothesis_template {template!r} has no single {{}} for the label; "
                "write one such as 'It is about {}.'"
            )
        return faults

    def notes(self) -> list[str]:
        """Returns a note if the entailment class was assumed."""
        if self.entailment >= 0:
            return []
        return ["the model's config names no class that begins with entail; its last class is used"]

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error if there are no candidate labels."""
        if self.params.candidate_labels or "candidate_labels" in present:
            return []
        return [
            "params.candidate_labels: no labels to choose among; name some, or give a column candidate_labels"
        ]

    def output_fields(self) -> list[pa.Field]:
        """`labels` and `scores`, lists of equal length."""
        return [pa.field("labels", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32()))]

    def labels_of(self, columns: Mapping[str, pa.Array]) -> list[list[str]]:
        """Returns the candidate labels of each row."""
        if "candidate_labels" in columns:
            return columns["candidate_labels"].to_pylist()
        return [self.params.candidate_labels or []] * len(columns["text"])

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text with each of its labels; only the text is truncated to the length limit.

        :raises ValueError: for an empty text, a row without labels, and a label that leaves no room for the text.
        """
        texts, labels = columns["text"].to_pylist(), self.labels_of(columns)
        if not all(texts):
            raise ValueError("the text is empty; filter empty texts out")
        if not all(labels) or any(None in row for row in labels):
            raise ValueError("a row needs at least one candidate label, and none that is null")
        hypotheses = [[self.params.hypothesis_template.format(label) for label in row] for row in labels]
        tokens, cut = pair_up(self.tokenizer, texts, hypotheses, self.limit)
        counts = np.array([len(row) for row in labels])
        table = pa.table({name: nest(values, counts) for name, values in tokens.items()})
        return Features(table, any_of(cut, counts))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns `logits` of contradiction and entailment, float32 [batch, 2]."""
        import torch

        logits = self.classify(model, batch).float()
        against = -1 if self.entailment == 0 else 0
        return {"logits": torch.stack([logits[:, against], logits[:, self.entailment]], dim=1)}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns labels and scores, best first; among equal scores the later label first, as in the pipeline."""
        lists = flatten(outputs["logits"])
        counts = list_lengths(lists)
        row, starts = np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - counts
        logits = lists.flatten().flatten().to_numpy().reshape(-1, 2).astype(np.float64)
        alone = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
        power = np.exp(logits[:, 1] - np.maximum.reduceat(logits[:, 1], starts)[row])
        shared = power / np.add.reduceat(power, starts)[row]
        score = np.where(self.params.multi_label | (counts == 1)[row], alone, shared).astype(np.float32)
        order = np.lexsort((-np.arange(len(row)), -score, row))
        names = [name for labels in self.labels_of(columns) for name in labels]
        best = pa.array(names, pa.string()).take(pa.array(order)), pa.array(score[order])
        return [lists_of(values, counts) for values in best]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best label of each row."""
        return best_scores(columns)
