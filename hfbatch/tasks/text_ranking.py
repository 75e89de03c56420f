"""Task text-ranking: how well each of some documents fits a query. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from hfbatch.tasks.base import Example, Features, Histogram, InputColumn, Params
from hfbatch.tasks.parts.encoder import EncoderTask
from hfbatch.tasks.parts.text import (
    flatten,
    is_words,
    list_lengths,
    lists_of,
    require_tokens,
    text_column,
    tokenize,
)
from hfbatch.tasks.parts.windows import TOKENS, any_of

if TYPE_CHECKING:
    import torch


class TextRankingParams(Params):
    """How scores are made."""

    activation: Literal["sigmoid", "none"] = "sigmoid"
    """sigmoid gives scores from 0 to 1; none gives the model's logits."""


class TextRanking(EncoderTask):
    """Scores of documents for a query, by a cross-encoder.

    Source: sentence-transformers' CrossEncoder.predict: the logit of a model of one label through a sigmoid,
    logits of several labels as they are; here the first label counts.
    """

    name = "text-ranking"
    general = False
    summary = "How well each of some documents fits a query, by a cross-encoder"
    auto_class = "AutoModelForSequenceClassification"
    inputs = (text_column("query"), InputColumn("documents", is_words, "list<string>"))
    outputs: ClassVar[Mapping[str, str]] = {"scores": "list<float32>, in the order of the documents"}
    Params = TextRankingParams
    split_rows = 2048
    windows = TOKENS
    histogram = Histogram("best score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"query": ["small houses"], "documents": [["A tiny home.", "The stock market."]]})

    params: TextRankingParams

    def output_fields(self) -> list[pa.Field]:
        """`scores`: one for each document."""
        return [pa.field("scores", pa.list_(pa.float32()))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokens of the query with each document; of the query alone where there is no document.

        :raises ValueError: for a document that is null, and for a pair without any token.
        """
        documents = [row or [""] for row in columns["documents"].to_pylist()]
        counts = np.array([len(row) for row in documents])
        pairs = [text for row in documents for text in row]
        if None in pairs:
            raise ValueError("one of the documents is null; filter such documents out")
        queries = [
            query for query, row in zip(columns["query"].to_pylist(), documents, strict=True) for _ in row
        ]
        made = require_tokens(tokenize(self.tokenizer, queries, pairs, self.limit))
        names = made.table.column_names
        table = pa.table({name: lists_of(flatten(made.table[name]), counts) for name in names})
        return Features(table, any_of(made.cut, counts))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`score` float32 [batch]."""
        logit = self.classify(model, batch)[:, 0].float()
        return {"score": logit.sigmoid() if self.params.activation == "sigmoid" else logit.contiguous()}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """The scores of each row; none where the query stood alone."""
        scores = flatten(outputs["score"]).flatten().to_numpy()
        documents = list_lengths(columns["documents"])
        real = np.repeat(documents > 0, np.maximum(documents, 1))
        return [lists_of(pa.array(scores[real]), documents)]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """The best score of each row; 0 where there is no document."""
        return np.array([max(row, default=0.0) for row in flatten(columns[0]).to_pylist()])
