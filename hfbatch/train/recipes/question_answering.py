"""Training question-answering: the position of the answer in the context, or that there is no answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Features, InputColumn, Params
from hfbatch.tasks.text.question_answering import OUTSIDE, QuestionAnswering, QuestionAnsweringParams
from hfbatch.tasks.tokens import (
    flatten,
    is_words,
    list_lengths,
    lists_of,
    pad,
    text_column,
    tokenize,
)
from hfbatch.train.metrics.answers import answer_scores
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, Predicted, Recipe, faults_at, items_of

if TYPE_CHECKING:
    import torch

Answers = tuple[list[str], list[int]]
"""Texts of a question's right answers, and the offset of each in the context."""
NOWHERE = 0
"""Index of the token that stands for no answer: the first."""
LABELS = 3
"""Labels per window: first token, last token, and number of tokens."""
SCORED = 256
"""Windows per batch in which the best spans are computed."""


class QuestionAnsweringTraining(Params):
    """Windows of long contexts, and length of answers."""

    doc_stride: int = Field(default=128, ge=1)
    """Tokens that two windows of a long context share; at most half of those that the question leaves."""
    max_answer_len: int = Field(default=15, ge=1)
    """Most tokens of a predicted answer in evaluation; training uses answers of any length."""


def is_numbers(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds lists of integers."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def is_answers(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds answers as in SQuAD, or lists of their texts."""
    if not pa.types.is_struct(kind):
        return is_words(kind)
    parts = {field.name: field.type for field in kind}
    return is_words(parts.get("text", pa.null())) and is_numbers(parts.get("answer_start", pa.null()))


class QuestionAnsweringRecipe(Recipe):
    """Trains on the first answer of each question; evaluation compares predictions with all answers.

    A long context is split into windows, each of them a row of the features: `input_ids` and the like, list<int32>;
    `start` and `end`, the character offsets of each token, as in the task; `labels`, see `targets_of`; and in the
    first window of a question its `context` and the texts of its `answers`, list<string>.
    """

    name = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    columns = (
        text_column("question"),
        text_column("context"),
        InputColumn(
            "answers", is_answers, "struct<text: list<string>, answer_start: list<integer>> or list<string>"
        ),
        InputColumn("answer_starts", is_numbers, "list<integer>", required=False),
    )
    Params = QuestionAnsweringTraining
    params: QuestionAnsweringTraining
    task: QuestionAnswering

    @classmethod
    def task_params(
        cls, params: QuestionAnsweringTraining, max_length: int | None, fitted: Mapping[str, Any]
    ) -> QuestionAnsweringParams:
        """Returns the windows and answers of the params; no answer is allowed if the training set has such rows."""
        asked = {} if max_length is None else {"max_seq_len": max(max_length, 8)}
        return QuestionAnsweringParams(
            doc_stride=params.doc_stride,
            max_answer_len=params.max_answer_len,
            handle_impossible_answer=fitted.get("unanswerable", False),
            **asked,
        )

    @property
    def metric(self) -> str:
        """F1 over the words of answers."""
        return "f1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics over all questions, and over answerable and unanswerable ones if both occur."""
        apart = ("f1_answerable", "exact_match_answerable", "accuracy_unanswerable")
        return "f1", "exact_match", *(apart if self.fitted["unanswerable"] else ())

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Counts questions with and without answers, and finds invalid rows."""
        statistics = DatasetStatistics(len(places))
        if not pa.types.is_struct(columns["answers"].type) and "answer_starts" not in columns:
            statistics.faults = [
                "answers has no offsets; use --column answer_starts=COLUMN for the start of each answer"
            ]
            return statistics
        questions, contexts = (columns[name].to_pylist() for name in ("question", "context"))
        rows = list(zip(questions, contexts, answers_of(columns), strict=True))
        faults = {place: fault for place, row in enumerate(rows) if (fault := fault_of(*row))}
        tokenizer, limit = self.task.tokenizer, self.task.limit
        asked = tokenize(tokenizer, [text or "" for text in questions], add_special_tokens=False).table
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - list_lengths(asked["input_ids"])
        for place in np.flatnonzero(room < 1).tolist():
            faults.setdefault(place, f"question leaves no room for its context in {limit} tokens")
        statistics.labels = Counter("answerable" if texts else "unanswerable" for *_, (texts, _) in rows)
        statistics.faults = faults_at(faults, places)
        return statistics

    def fit(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
        """Returns `unanswerable`: whether the model may predict that there is no answer."""
        return {"unanswerable": statistics.labels["unanswerable"] > 0}

    def train_faults(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> list[str]:
        """Checks that some question has an answer."""
        if statistics.labels and not statistics.labels["answerable"]:
            return ["no training row has an answer; there is nothing to train on"]
        return []

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns windows over contexts; see the class.

        Rows whose answer is not complete in any window count as truncated and have no targets.
        """
        from hfbatch.train.data.rows import ROW

        made = self.task.preprocess(columns, places).table
        windows = list_lengths(made["input_ids"])
        tokens = {name: flatten(made[name]).flatten() for name in made.column_names}
        owner = np.repeat(np.arange(len(windows)), windows)
        answers = answers_of(columns)
        labels, cut = targets_of(tokens["start"], tokens["end"], owner, answers)
        texts = [texts for texts, _ in answers]
        place = pa.array(owner, mask=np.diff(owner, prepend=-1) == 0)
        beside = {
            "labels": pa.array(list(labels), pa.list_(pa.int32())),
            "context": columns["context"].take(place),
            "answers": pa.array(texts, pa.list_(pa.string())).take(place),
            ROW: pa.array(owner),
        }
        return Features(pa.table({**tokens, **beside}), cut)

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Returns padded tokens; labels int64 [batch, 3]."""
        import torch

        batch = self.task.collate(features, np.arange(len(features)), 1)
        batch["labels"] = (
            flatten(features["labels"]).flatten().to_numpy().reshape(-1, LABELS).astype(np.int64)
        )
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes the mean cross-entropy of the first and the last token over the tokens of a window.

        Differs from transformers in that padding is masked: otherwise a row's loss would depend on its batch.

        :param labels: int64 [batch, 3]: first, last, and number of tokens; each of the three is an item.
        """
        import torch

        items = items_of(labels, num_items_in_batch)
        counted = labels[:, 2] != IGNORED
        labels, sizes = labels[counted, :2], labels[counted, 2]
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()[counted]
        padding = torch.arange(logits.shape[-1], device=logits.device) >= sizes[:, None, None]
        shares = logits.masked_fill(padding, -torch.inf).log_softmax(-1)
        right = shares.gather(-1, labels[..., None]).sum()
        spread = (shares.masked_fill(padding, 0).sum((1, 2)) / sizes).sum()
        total = (1 - self.label_smoothing) * right + self.label_smoothing * spread
        return -total / 2 * LABELS / items

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Returns start and end logits of each window, float32 [2, tokens of the batch's longest]."""
        import torch

        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        loss = float(self.loss(outputs, batch["labels"], 1))
        ends = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu().numpy()
        return Predicted(list(ends), loss, int(batch["labels"].ne(IGNORED).sum()))

    def score(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, float]:
        """Computes exact_match and f1 of each question's best span over its windows, chosen as in the task."""
        return answer_scores(
            features["answers"].drop_null().to_pylist(), self._answers(predictions, features)
        )

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """Returns the loss of each window, 0 for one without targets, and its question's predicted and right answers."""
        owner = np.cumsum(features["context"].is_valid().to_numpy()) - 1
        right = [" | ".join(texts) or "no answer" for texts in features["answers"].drop_null().to_pylist()]
        found = [text or "no answer" for text in self._answers(predictions, features)]
        labels = flatten(features["labels"]).flatten().to_numpy().reshape(-1, LABELS)
        return {
            "losses": [window_loss(*pair) for pair in zip(predictions, labels, strict=True)],
            "truths": [right[row] for row in owner],
            "guesses": [found[row] for row in owner],
        }

    def _answers(self, predictions: list[np.ndarray], features: pa.Table) -> list[str]:
        """Returns the best answer to each question."""
        first = features["context"].is_valid().to_numpy()
        windows = np.bincount(np.cumsum(first) - 1)
        outputs = pa.table(
            {name: lists_of(values, windows) for name, values in self._spans(predictions, features)}
        )
        contexts = features["context"].drop_null()
        found = self.task.postprocess(outputs, {"context": contexts})[0].to_pylist()
        return [row[0]["answer"] for row in found]

    def _spans(self, predictions: list[np.ndarray], features: pa.Table) -> list[tuple[str, pa.Array]]:
        """Returns the best spans of each window, in the columns that the task's forward returns."""
        import torch

        parts = []
        for begin in range(0, len(features), SCORED):
            rows = np.arange(begin, min(begin + SCORED, len(features)))
            start, end = (
                torch.from_numpy(pad(features[name], rows, fill)[0])
                for name, fill in (("start", OUTSIDE), ("end", 0))
            )
            logits = torch.zeros(2, *start.shape)
            for place, row in enumerate(rows):
                known = predictions[row][:, : start.shape[1]]
                logits[:, place, : known.shape[1]] = torch.from_numpy(known)
            parts.append(self.task.best_spans((logits[0], logits[1]), (start, end)))
        spans = {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}
        return [(name, pa.array(list(v) if v.ndim > 1 else v)) for name, v in spans.items()]

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Predicts no answer for every question, if the training set has unanswerable ones."""
        if not self.fitted["unanswerable"]:
            return {}
        answers = features["answers"].drop_null().to_pylist()
        return answer_scores(answers, [""] * len(answers))


def window_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Computes the mean cross-entropy of a window's first and last token.

    :param logits: float [2, tokens], padded at the end.
    :param labels: first, last, and number of tokens; IGNORED for a window without targets.
    """
    from scipy.special import log_softmax

    first, last, size = labels.tolist()
    if size == IGNORED:
        return 0.0
    shares = log_softmax(logits[:, :size].astype(np.float64), axis=1)
    return float(-(shares[0, first] + shares[1, last]) / 2)


def answers_of(columns: Mapping[str, pa.Array]) -> list[Any]:
    """Returns the `Answers` of each row without validation, nulls included."""
    answers = columns["answers"].to_pylist()
    if pa.types.is_struct(columns["answers"].type):
        return [(row and row["text"], row and row["answer_start"]) for row in answers]
    return list(zip(answers, columns["answer_starts"].to_pylist(), strict=True))


def fault_of(
    question: str | None, context: str | None, answers: tuple[list[Any] | None, list[Any] | None]
) -> str:
    """Returns the fault of a row; empty if there is none."""
    for name, text in (("question", question), ("context", context)):
        if not text or not text.strip():
            return f"{name} is {'null' if text is None else 'empty'}"
    texts, starts = answers
    if texts is None or starts is None:
        return "answers is null; give empty lists where there is none"
    if len(texts) != len(starts):
        return f"{len(texts)} answers have {len(starts)} starts; give each answer one"
    for text, start in zip(texts, starts, strict=True):
        if text is None or start is None or not text.strip():
            return f"answer {text!r} at {start} is null or empty; give empty lists where there is none"
        if start < 0 or start + len(text) > len(context or ""):
            return f"answer {text!r} at {start} is outside the context, which has {len(context or '')} characters"
        there = (context or "")[start : start + len(text)]
        if there != text:
            return f"answer {text!r} is not at its offset {start}, where the context has {there!r}"
    return ""


def targets_of(
    start: pa.Array, end: pa.Array, owner: np.ndarray, answers: list[Answers]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the position of each row's first answer in its windows.

    :param start: offset of the first character of each window's tokens, OUTSIDE for tokens that are not of the
        context; `end`: one after the last.
    :param owner: the row of each window, int64 [windows].
    :returns: first and last token of the answer and number of tokens of the window, int64 [windows, 3]: NOWHERE twice
        if the window lacks the whole answer, IGNORED if all windows of the row lack it; and the rows for which all
        do, bool [rows].
    """
    spans = np.array([(at[0], at[0] + len(texts[0])) if texts else (0, 0) for texts, at in answers])
    sizes = list_lengths(start)
    window = np.repeat(np.arange(len(owner)), sizes)
    place = np.arange(len(window)) - (np.cumsum(sizes) - sizes)[window]
    first, last = start.flatten().to_numpy(), end.flatten().to_numpy()
    begin, stop = spans[owner[window]].T
    hit = (first != OUTSIDE) & (first < stop) & (last > begin)
    mine = window[hit]
    tokens = extent(mine, place[hit], place[hit], len(owner))
    there = extent(mine, first[hit], last[hit], len(owner))
    whole = extent(owner[mine], first[hit], last[hit], len(answers))
    has = (there == whole[owner]).all(axis=1) & (tokens[:, 1] >= 0)
    cut = np.array([bool(texts) for texts, _ in answers])
    cut[owner[has]] = False
    labels = np.column_stack([np.where(has[:, None], tokens, NOWHERE), sizes])
    labels[cut[owner]] = IGNORED
    return labels, cut


def extent(group: np.ndarray, low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """Returns the lowest `low` and highest `high` of each group, int64 [count, 2]; the highest of an empty one is -1."""
    found = np.tile([np.iinfo(np.int64).max, -1], (count, 1))
    np.minimum.at(found[:, 0], group, low)
    np.maximum.at(found[:, 1], group, high)
    return found
