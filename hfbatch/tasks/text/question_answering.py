"""Task question-answering: returns the spans of a context that answer a question."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Best
from hfbatch.tasks.base import Batch, Example, Features, Histogram, Params
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.windows import TOKENS, encode_windows, nest
from hfbatch.tasks.tokens import flatten, list_lengths, lists_of, pad, run_text, text_column, tokenize

if TYPE_CHECKING:
    import torch

ANSWER = pa.struct(
    [("score", pa.float32()), ("start", pa.int32()), ("end", pa.int32()), ("answer", pa.string())]
)
OUTSIDE = -1
"""The first character of a token outside the context."""


class QuestionAnsweringParams(Params):
    """Options for the returned spans and for windows over long contexts."""

    top_k: int = Field(default=1, ge=1)
    """Number of answers to return, best first."""
    doc_stride: int = Field(default=128, ge=1)
    """Overlap in tokens between windows of a long context; at most half of the room beside the question."""
    max_seq_len: int = Field(default=384, ge=8)
    """Maximum tokens of a window, question included; at most the model's limit."""
    max_answer_len: int = Field(default=15, ge=1)
    """Maximum tokens of an answer."""
    handle_impossible_answer: bool = False
    """Allow an empty answer, for models trained on questions without an answer."""


class QuestionAnswering(EncoderTask):
    """Returns the best spans of each context, with their positions.

    Source: run_qa of transformers' examples and the pipeline of transformers 4: in each window, the softmax of
    start and end logits over the context's tokens and the first token, which represents no answer; a span's
    score is the product. A span found in two windows counts with its better score.
    """

    name = "question-answering"
    summary = "The span of a context that answers a question"
    auto_class = "AutoModelForQuestionAnswering"
    inputs = (text_column("question"), text_column("context"))
    outputs: ClassVar[Mapping[str, str]] = {"answers": "list<struct<score, start, end, answer>>, best first"}
    Params = QuestionAnsweringParams
    split_rows = 2048
    windows = (*TOKENS, "start", "end")
    agreement = Best("answers")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"question": ["Who wrote it?"], "context": ["It was written by Ada in London."]})

    params: QuestionAnsweringParams

    @cached_property
    def limit(self) -> int:
        """Maximum tokens of a window."""
        return min(self.params.max_seq_len, super().limit or self.params.max_seq_len)

    def check(self) -> list[str]:
        """Also returns an error for a tokenizer that returns no token offsets."""
        faults = super().check()
        if not faults and not self.tokenizer.is_fast:
            faults.append(
                f"model {self.model.name!r} has a tokenizer without offsets; use one with tokenizer.json"
            )
        return faults

    def output_fields(self) -> list[pa.Field]:
        """`answers`: a list of structs, with character positions counted from the start of the context."""
        return [pa.field("answers", pa.list_(ANSWER))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns windows over each context, preceded by the question, with the character offsets of context tokens.

        :raises ValueError: for a question that leaves no room.
        """
        questions, contexts = columns["question"].to_pylist(), columns["context"].to_pylist()
        bare = tokenize(self.tokenizer, questions, add_special_tokens=False, return_token_type_ids=False)
        room = self.limit - self.tokenizer.num_special_tokens_to_add(pair=True)
        room = room - list_lengths(bare.table["input_ids"])
        if room.min(initial=self.limit) < 1:
            raise ValueError(f"the question leaves no room for the context in {self.limit} tokens")
        strides = np.minimum(self.params.doc_stride, room // 2)
        tables, order = [], []
        for stride in np.unique(strides):
            rows = np.flatnonzero(strides == stride)
            order.append(rows)
            texts = [questions[row] for row in rows], [contexts[row] for row in rows]
            tables.append(self._windows(*texts, int(stride)))
        return Features(pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(order)))))

    def _windows(self, questions: list[str], contexts: list[str], stride: int) -> pa.Table:
        """Returns features of rows whose windows overlap by the same number of tokens."""
        encoded, owner = encode_windows(
            self.tokenizer,
            questions,
            contexts,
            truncation="only_second",
            max_length=self.limit,
            stride=stride,
        )
        sizes = [len(window) for window in encoded["input_ids"]]
        parts = chain.from_iterable(encoded.sequence_ids(place) for place in range(len(sizes)))
        characters = np.array(list(chain.from_iterable(encoded["offset_mapping"])), np.int32).reshape(-1, 2)
        starts = np.where([part == 1 for part in parts], characters[:, 0], OUTSIDE)
        counts = np.bincount(owner)
        columns = {name: nest(encoded[name], counts) for name in TOKENS if name in encoded}
        for name, values in (("start", starts), ("end", characters[:, 1])):
            columns[name] = lists_of(lists_of(pa.array(values, pa.int32()), sizes), counts)
        return pa.table(columns)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns token ids and offsets padded on the right."""
        batch = super().collate(features, rows, multiple)
        for name, fill in (("start", OUTSIDE), ("end", 0)):
            batch[name], _ = pad(features[name], rows, fill, multiple, limit=self.limit)
        return batch

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the best spans of each window; see `best_spans`."""
        characters = batch.pop("start"), batch.pop("end")
        output = run_text(model, batch)
        return self.best_spans((output.start_logits, output.end_logits), characters)

    def best_spans(
        self, ends: tuple[torch.Tensor, torch.Tensor], characters: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the best spans of each window, best first, and the score of no answer.

        :param ends: start and end logits, float [batch, tokens].
        :param characters: start and exclusive end of each token in characters, int [batch, tokens].
        :returns: `score` float64, `start` and `end` (characters) int32 [batch, top_k]; `none` float64 [batch].
        """
        import torch
        from torch.nn import functional

        inside = characters[0] != OUTSIDE
        usable = inside.clone()
        usable[:, 0] = True
        start, end = (logits.double().masked_fill(~usable, -torch.inf).softmax(-1) for logits in ends)
        none = start[:, 0] * end[:, 0]
        longest, count = self.params.max_answer_len, self.params.top_k
        reach = functional.pad(end * inside, (0, longest - 1)).unfold(1, longest, 1)
        spans = ((start * inside).unsqueeze(-1) * reach).flatten(1)
        score, place = functional.pad(spans, (0, max(count - spans.shape[1], 0))).topk(count)
        first = (place // longest).clamp(max=start.shape[1] - 1)
        last = (first + place % longest).clamp(max=start.shape[1] - 1)
        found = (numbers.gather(1, index) for numbers, index in zip(characters, (first, last), strict=True))
        begin, stop = (numbers.to(torch.int32) for numbers in found)
        return {"score": score, "start": begin, "end": stop, "none": none}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the best spans over all windows of each row, with their text."""
        row, score, start, end = rank_spans(self._candidates(outputs), self.params.top_k)
        contexts = columns["context"].to_pylist()
        places = zip(row.tolist(), start.tolist(), end.tolist(), strict=True)
        texts = [contexts[at][first:last] for at, first, last in places]
        answers = pa.StructArray.from_arrays(
            [pa.array(score, pa.float32()), pa.array(start), pa.array(end), pa.array(texts, pa.string())],
            fields=list(ANSWER),
        )
        return [lists_of(answers, np.bincount(row, minlength=len(outputs)))]

    def _candidates(self, outputs: pa.Table) -> list[np.ndarray]:
        """Returns row, score, start and end of all spans; adds an empty span if allowed or if a row has no other."""
        windows = list_lengths(outputs["none"])
        row = np.repeat(np.arange(len(windows)), windows * self.params.top_k)
        spans = [flatten(outputs[name]).flatten().flatten().to_numpy() for name in ("score", "start", "end")]
        found = [values[spans[0] > 0] for values in (row, *spans)]
        if self.params.handle_impossible_answer:
            rows = np.arange(len(windows))
            none = flatten(outputs["none"]).flatten().to_numpy()
            score = np.minimum.reduceat(none, np.cumsum(windows) - windows)
        else:
            rows = np.setdiff1d(np.arange(len(windows)), found[0])
            score = np.zeros(len(rows))
        nowhere = np.zeros(len(rows), np.int32)
        return [np.append(found[k], more) for k, more in enumerate((rows, score, nowhere, nowhere))]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best answer of each row."""
        answers = flatten(columns[0])
        return answers.values.field("score").to_numpy()[answers.offsets.to_numpy()[:-1]]


def rank_spans(spans: list[np.ndarray], top_k: int) -> list[np.ndarray]:
    """Returns the best spans of each row, best first; a span found twice counts with its better score.

    :param spans: row, score, start and end, each [spans].
    :returns: the same arrays for the remaining spans, sorted by row.
    """
    row, score, start, end = spans
    order = np.lexsort((-score, end, start, row))
    first = np.ones(len(order), bool)
    first[1:] = np.any([np.diff(values[order]) != 0 for values in (row, start, end)], axis=0)
    once = order[first]
    ranked = once[np.lexsort((end[once], start[once], -score[once], row[once]))]
    place = np.arange(len(ranked)) - np.searchsorted(row[ranked], row[ranked])
    return [values[ranked[place < top_k]] for values in spans]
