"""Task text-ranking: scores the relevance of documents to a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from hfbatch.tasks.agreement import Ranking
from hfbatch.tasks.base import Example, Features, Histogram, InputColumn, Params
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.windows import TOKENS, any_of
from hfbatch.tasks.tokens import (
    flatten,
    is_words,
    list_lengths,
    lists_of,
    require_tokens,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch


class TextRankingParams(Params):
    """Options for scores."""

    activation: Literal["sigmoid", "none"] = "sigmoid"
    """sigmoid returns scores from 0 to 1; none returns the model's logits."""


class TextRanking(EncoderTask):
    """Scores documents for a query with a cross-encoder.

    Source: sentence-transformers' CrossEncoder.predict: the sigmoid of the logit of a model with one label,
    and raw logits of several labels, of which the first is used here.
    """

    name = "text-ranking"
    general = False
    summary = "Relevance scores of documents for a query, by a cross-encoder"
    auto_class = "AutoModelForSequenceClassification"
    inputs = (text_column("query"), InputColumn("documents", is_words, "list<string>"))
    outputs: ClassVar[Mapping[str, str]] = {"scores": "list<float32>, in the order of the documents"}
    Params = TextRankingParams
    split_rows = 2048
    windows = TOKENS
    agreement = Ranking("scores")
    histogram = Histogram("best score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"query": ["small houses"], "documents": [["A tiny home.", "The stock market."]]})

    params: TextRankingParams

    def output_fields(self) -> list[pa.Field]:
        """`scores`: one per document."""
        return [pa.field("scores", pa.list_(pa.float32()))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes the query with each document; the query alone if there is no document.

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
        """Returns `score` float32 [batch]."""
        logit = self.classify(model, batch)[:, 0].float()
        return {"score": logit.sigmoid() if self.params.activation == "sigmoid" else logit.contiguous()}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the scores of each row; none if it has no documents."""
        scores = flatten(outputs["score"]).flatten().to_numpy()
        documents = list_lengths(columns["documents"])
        real = np.repeat(documents > 0, np.maximum(documents, 1))
        return [lists_of(pa.array(scores[real]), documents)]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the best score of each row; 0 if there is no document."""
        return np.array([max(row, default=0.0) for row in flatten(columns[0]).to_pylist()])
