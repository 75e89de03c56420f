"""Task question-answering: the span of a context that answers a question. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Example, Histogram, Params
from hfbatch.tasks.parts.pipeline import PipelineTask
from hfbatch.tasks.parts.text import flatten, text_column

ANSWER = pa.struct(
    [("score", pa.float32()), ("start", pa.int32()), ("end", pa.int32()), ("answer", pa.string())]
)


class QuestionAnsweringParams(Params):
    """Which spans to return, and how long contexts are read."""

    top_k: int = Field(default=1, ge=1)
    """How many answers to return, best first."""
    doc_stride: int = Field(default=128, ge=1)
    """Tokens that two windows of a long context share; at most half of the room beside the question."""
    max_seq_len: int = Field(default=384, ge=8)
    """Tokens of a window with the question; at most the model's limit."""
    max_answer_len: int = Field(default=15, ge=1)
    """Most tokens of an answer."""
    handle_impossible_answer: bool = False
    """Let an empty answer compete, for models trained on questions without one."""


class QuestionAnswering(PipelineTask):
    """The best spans of each context, with their place in it."""

    name = "question-answering"
    summary = "The span of a context that answers a question"
    auto_class = "AutoModelForQuestionAnswering"
    pipeline = "hfbatch.tasks.parts.dropped.QuestionAnsweringPipeline"
    inputs = (text_column("question"), text_column("context"))
    outputs: ClassVar[Mapping[str, str]] = {"answers": "list<struct<score, start, end, answer>>, best first"}
    Params = QuestionAnsweringParams
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"question": ["Who wrote it?"], "context": ["It was written by Ada in London."]})

    def output_fields(self) -> list[pa.Field]:
        """`answers`: a list of structs, characters counted from the start of the context."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Questions with their contexts."""
        pairs = zip(columns["question"].to_pylist(), columns["context"].to_pylist(), strict=True)
        yield from ({"question": question, "context": context} for question, context in pairs)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best answer of each row."""
        return np.array([row[0]["score"] for row in flatten(columns[0]).to_pylist()])
