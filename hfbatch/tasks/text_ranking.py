"""Task text-ranking: how well each of some documents fits a query. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Example, Histogram, InputColumn, Params
from hfbatch.tasks.parts.pipeline import PipelineTask
from hfbatch.tasks.parts.text import flatten, is_words, text_column


class TextRankingParams(Params):
    """How scores are made."""

    activation: Literal["sigmoid", "none"] = "sigmoid"
    """sigmoid gives scores from 0 to 1; none gives the model's logits."""


class TextRanking(PipelineTask):
    """Scores of documents for a query, by a cross-encoder."""

    name = "text-ranking"
    general = False
    summary = "How well each of some documents fits a query, by a cross-encoder"
    auto_class = "AutoModelForSequenceClassification"
    pipeline = "hfbatch.tasks.parts.dropped.TextRankingPipeline"
    inputs = (text_column("query"), InputColumn("documents", is_words, "list<string>"))
    outputs: ClassVar[Mapping[str, str]] = {"scores": "list<float32>, in the order of the documents"}
    Params = TextRankingParams
    histogram = Histogram("best score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"query": ["small houses"], "documents": [["A tiny home.", "The stock market."]]})

    def output_fields(self) -> list[pa.Field]:
        """`scores`: one for each document."""
        return [pa.field("scores", pa.list_(pa.float32()))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Queries with their documents."""
        pairs = zip(columns["query"].to_pylist(), columns["documents"].to_pylist(), strict=True)
        yield from ({"query": query, "documents": documents} for query, documents in pairs)

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Whether the query and one of its documents are too long together."""
        limit = self.limit or 0
        return any(
            limit
            and step["input_ids"].shape[-1] >= limit
            and len(self.tokenizer(row["query"], document, verbose=False)["input_ids"]) > limit
            for step, document in zip(steps, row["documents"], strict=True)
        )

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """The best score of each row; 0 where there is no document."""
        return np.array([max(row, default=0.0) for row in flatten(columns[0]).to_pylist()])
