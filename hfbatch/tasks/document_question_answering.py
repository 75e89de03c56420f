"""Task document-question-answering: what a page says to a question. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from shutil import which
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.data.media import to_image
from hfbatch.tasks.base import Example, Histogram, InputColumn, Params
from hfbatch.tasks.parts.text import is_words, length_faults, length_limit, text_column
from hfbatch.tasks.parts.vision import IMAGE
from hfbatch.tasks.parts.writing import BrieflyProbed

ANSWER = pa.struct(
    [("score", pa.float32()), ("answer", pa.string()), ("start", pa.int32()), ("end", pa.int32())]
)
FINDER, WRITER = "LayoutLMForQuestionAnswering", "VisionEncoderDecoderModel"
ONLY_FINDER = (
    *("doc_stride", "max_seq_len", "max_answer_len", "handle_impossible_answer", "lang"),
    "top_k",
)
ONLY_WRITER = ("max_new_tokens", "num_beams")


def is_boxes(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of lists of whole numbers."""
    for _ in range(2):
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return False
        kind = kind.value_type
    return pa.types.is_integer(kind)


class DocumentQuestionAnsweringParams(Params):
    """Which answers to return, and how long pages are read; a null takes the model's or the pipeline's default."""

    top_k: int = Field(default=1, ge=1)
    """How many answers to return, best first."""
    doc_stride: int | None = Field(default=None, ge=0)
    """Tokens that two windows of a long page share; null is half of a window, at most 256."""
    max_seq_len: int | None = Field(default=None, ge=8)
    """Tokens of a window with the question; null is the model's limit."""
    max_answer_len: int | None = Field(default=None, ge=1)
    """Most tokens of an answer; null is 15."""
    handle_impossible_answer: bool = False
    """Let an empty answer compete, for models trained on questions without one."""
    lang: str | None = None
    """Language of the page for OCR by Tesseract, such as `deu`; null is English."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that a model such as Donut writes; at last 256."""
    num_beams: int | None = Field(default=None, ge=1)
    """Beams of beam search, for models that write; at last 1."""


class DocumentQuestionAnswering(BrieflyProbed):
    """The best answers to a question about each page, found among its words or written by the model.

    A LayoutLM reads the page's words and where they stand: columns `words` and `boxes` (left, top, right and
    bottom from 0 to 1000), or else OCR of `image`. A Donut reads the picture alone.
    """

    name = "document-question-answering"
    summary = "Answers to a question about a page, by a model such as LayoutLM or Donut"
    auto_class = "AutoModelForDocumentQuestionAnswering"
    pipeline = "hfbatch.tasks.parts.multimodal.DocumentPipeline"
    inputs = (
        replace(IMAGE, required=False),
        text_column("question"),
        InputColumn("words", is_words, "list<string>", required=False),
        InputColumn("boxes", is_boxes, "list<list<int>>, 0 to 1000", required=False),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "answers": "list<struct<score, answer, start, end>>, best first, start and end among the words; "
        "a written answer has nothing but itself"
    }
    Params = DocumentQuestionAnsweringParams
    split_rows = 256
    concurrent = False
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example(
        {
            "question": ["Who wrote it?"],
            "words": [["Written", "by", "Ada"]],
            "boxes": [[[100, 50, 300, 80], [310, 50, 360, 80], [370, 50, 450, 80]]],
        },
        {"doc_stride": 16},
    )

    params: DocumentQuestionAnsweringParams

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        config = self.model.read_json("config.json") or {}
        self.writes = config.get("model_type") == "vision-encoder-decoder"
        if self.writes:
            self.auto_class = "AutoModelForImageTextToText"

    def options(self) -> dict[str, Any]:
        """The params, and that nothing is drawn at random."""
        return {**super().options(), "do_sample": False}

    def check(self) -> list[str]:
        """Faults: a model of another task, params that it does not use, and windows beyond its limit."""
        from hfbatch.tasks.parts.multimodal import architecture_faults

        instead = "a LayoutLM for question answering or a Donut, or task visual-question-answering"
        faults = architecture_faults(self, (FINDER, WRITER), instead)
        if faults:
            return faults
        asked = self.params.model_dump(exclude_defaults=True)
        idle = [name for name in (ONLY_FINDER if self.writes else ONLY_WRITER) if name in asked]
        if idle:
            faults.append(
                f"params: {', '.join(idle)} mean nothing to {self.config.model_type}; leave them out"
            )
        width, limit = self.params.max_seq_len, length_limit(self.tokenizer, self.config)
        if width and limit and width > limit:
            faults.append(f"params.max_seq_len {width} is more than the model's {limit} tokens")
        faults += length_faults(self.max_length, self.tokenizer, self.config)
        return faults or super().check()

    def column_faults(self, present: set[str]) -> list[str]:
        """A page as the model reads it has to be there."""
        if self.writes:
            if "image" in present:
                return []
            return [f"model {self.model.name!r} reads pictures; use --column image=COLUMN"]
        if {"words", "boxes"} <= present:
            return []
        if {"words", "boxes"} & present:
            return [
                "columns 'words' and 'boxes' come together; use --column words=COLUMN --column boxes=COLUMN"
            ]
        if "image" in present and find_spec("pytesseract") and which("tesseract"):
            return []
        return [
            f"model {self.model.name!r} reads words and boxes; use --column words=COLUMN --column boxes=COLUMN, "
            "or give a column 'image' and install OCR: pip install 'hfbatch[ocr]' and the program tesseract"
        ]

    def output_fields(self) -> list[pa.Field]:
        """`answers`: a list of structs."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def rows(self, columns: Mapping[str, pa.Array]) -> Iterator[Any]:
        """Questions with their pages. :raises ValueError: for words without boxes, and boxes beyond the page."""
        boxed = not self.writes and "words" in columns
        for k, question in enumerate(columns["question"].to_pylist()):
            if boxed:
                words, boxes = columns["words"][k].as_py(), columns["boxes"][k].as_py()
                yield {"question": question, "word_boxes": _paired(words, boxes)}
            else:
                yield {"question": question, "image": to_image(columns["image"][k].as_py(), self.files)}

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Score of the best answer of each row; 0 for a written one and where there is none."""
        return np.array([(row[0]["score"] or 0.0) if row else 0.0 for row in columns[0].to_pylist()])


def _paired(words: list[str], boxes: list[list[int]]) -> list[tuple[str, list[int]]]:
    """Each word with its box."""
    if len(words) != len(boxes):
        raise ValueError(f"{len(words)} words have {len(boxes)} boxes")
    for box in boxes:
        if box is None or len(box) != 4 or not all(side is not None and 0 <= side <= 1000 for side in box):
            raise ValueError(f"box {box} is not left, top, right and bottom from 0 to 1000")
    return list(zip(words, boxes, strict=True))
