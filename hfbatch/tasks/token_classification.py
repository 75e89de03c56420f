"""Task token-classification: named entities and other spans of a text. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, InputColumn, Params
from hfbatch.tasks.parts.pipeline import TextPipelineTask
from hfbatch.tasks.parts.text import is_words, list_lengths, text_column


class TokenClassificationParams(Params):
    """How tokens become spans."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "none"
    """none gives each token; the others join tokens of one entity, and differ in how words are held together."""
    ignore_labels: list[str] = Field(default=["O"])
    """Labels that are left out."""
    stride: int | None = Field(default=None, ge=0)
    """Tokens that the windows of a long text share; null truncates long texts. Needs an aggregation."""
    delimiter: str = " "
    """What stands between words in the text that `start` and `end` count in, where words are given."""


class TokenClassification(TextPipelineTask):
    """Labels of tokens or of spans of tokens, with their place in the text."""

    name = "token-classification"
    aliases = ("ner",)
    summary = "Named entities and other spans of a text, with their place in it"
    auto_class = "AutoModelForTokenClassification"
    pipeline = "token_classification.TokenClassificationPipeline"
    inputs = (
        text_column("text", required=False),
        InputColumn("words", is_words, "list<string>", required=False),
    )
    exclusive = ("text", "words")
    outputs: ClassVar[Mapping[str, str]] = {
        "entities": "list<struct<entity, score, index, word, start, end>>; entity_group and no index if aggregated"
    }
    Params = TokenClassificationParams
    histogram = Histogram("entities", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example(
        {"text": ["Ada wrote to London.", "No name here.", ""]}, {"aggregation_strategy": "simple"}
    )

    params: TokenClassificationParams

    def options(self) -> dict[str, Any]:
        """Of the params, those that the pipeline takes when it is made."""
        options = super().options()
        options.pop("delimiter")
        return options

    def column_faults(self, present: set[str]) -> list[str]:
        """A fault where there is neither text nor words."""
        if present:
            return []
        return ["task token-classification needs a column 'text' or 'words'; use --column text=COLUMN"]

    @property
    def aggregated(self) -> bool:
        """Whether tokens of one entity are joined."""
        return self.params.aggregation_strategy != "none"

    def output_fields(self) -> list[pa.Field]:
        """`entities`: a list of structs with the keys that the pipeline returns."""
        numbers = [("start", pa.int32()), ("end", pa.int32())]
        if self.aggregated:
            head = [("entity_group", pa.string()), ("score", pa.float32())]
        else:
            head = [("entity", pa.string()), ("score", pa.float32()), ("index", pa.int32())]
        return [pa.field("entities", pa.list_(pa.struct([*head, ("word", pa.string()), *numbers])))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Texts, or lists of words."""
        yield from (columns.get("words", columns.get("text"))).to_pylist()

    def preprocess_options(self, columns: Mapping[str, pa.Array]) -> dict[str, Any]:
        """How words are put together."""
        if "words" not in columns:
            return {}
        return {"is_split_into_words": True, "delimiter": self.params.delimiter}

    def is_cut(self, row: Any, steps: list[Any]) -> bool:
        """Without a stride, a long row is truncated."""
        return self.params.stride is None and super().is_cut(row, steps)

    def whole(self, row: Any) -> int:
        """Tokens of a text or of words."""
        words = isinstance(row, list)
        return len(self.tokenizer(row, is_split_into_words=words, verbose=False)["input_ids"])

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Entities of each row."""
        return list_lengths(columns[0])
