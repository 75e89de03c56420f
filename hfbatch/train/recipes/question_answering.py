"""Training question-answering: where in a context the answer to a question stands, or that there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Features, InputColumn, Params
from hfbatch.tasks.parts.text import (
    flatten,
    is_words,
    list_lengths,
    lists_of,
    pad,
    text_column,
    tokenize,
)
from hfbatch.tasks.question_answering import OUTSIDE, QuestionAnswering, QuestionAnsweringParams
from hfbatch.train.metrics.answers import answer_scores
from hfbatch.train.recipes.base import IGNORED, Predicted, Recipe, Survey, faults_at, items_of

if TYPE_CHECKING:
    import torch

Answers = tuple[list[str], list[int]]
"""Texts of a question's right answers, and the first character of each in the context."""
NOWHERE = 0
"""The token that stands for no answer: the first."""
LABELS = 3
"""Numbers that are the labels of a window: first token, last token, and how many tokens it has."""
SCORED = 256
"""Windows whose best spans are found at a time."""


class QuestionAnsweringTraining(Params):
    """How long contexts are read, and how long answers may be."""

    doc_stride: int = Field(default=128, ge=1)
    """Tokens that two windows of a long context share; at most half of the room beside the question."""
    max_answer_len: int = Field(default=15, ge=1)
    """Most tokens of an answer that the model is measured with; learnt are those of any length."""


def is_numbers(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds lists of whole numbers."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def is_answers(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds answers as SQuAD has them, or lists of their texts."""
    if not pa.types.is_struct(kind):
        return is_words(kind)
    parts = {field.name: field.type for field in kind}
    return is_words(parts.get("text", pa.null())) and is_numbers(parts.get("answer_start", pa.null()))


class QuestionAnsweringRecipe(Recipe):
    """Learns where the first answer of each question stands; the model is held against all of them.

    A long context becomes several windows, of which each is a row of the features: `input_ids` and the like, list<int32>;
    `start` and `end`, the characters of each token as the task has them; `labels`, of `targets_of`; and in the
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

    def __init__(
        self, task: Any, params: Any, label_smoothing: float = 0.0, settled: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(task, params, label_smoothing, settled)
        asked = {} if task.max_length is None else {"max_seq_len": max(task.max_length, 8)}
        task.params = QuestionAnsweringParams(
            doc_stride=params.doc_stride, max_answer_len=params.max_answer_len, **asked
        )

    @property
    def metric(self) -> str:
        """F1 of the words of answers."""
        return "f1"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of all questions, and of both kinds where there are two."""
        apart = ("f1_answerable", "exact_match_answerable", "accuracy_unanswerable")
        return "f1", "exact_match", *(apart if self.settled["unanswerable"] else ())

    def examine(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Survey:
        """Counts questions with and without an answer."""
        survey = Survey(len(places))
        if not pa.types.is_struct(columns["answers"].type) and "answer_starts" not in columns:
            survey.faults = [
                "answers are texts alone; use --column answer_starts=COLUMN for where they begin"
            ]
            return survey
        questions, contexts = (columns[name].to_pylist() for name in ("question", "context"))
        rows = list(zip(questions, contexts, answers_of(columns), strict=True))
        faults = {place: fault for place, row in enumerate(rows) if (fault := fault_of(*row))}
        tokenizer, limit = self.task.tokenizer, self.task.limit
        asked = tokenize(tokenizer, [text or "" for text in questions], add_special_tokens=False).table
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - list_lengths(asked["input_ids"])
        for place in np.flatnonzero(room < 1).tolist():
            faults.setdefault(place, f"question leaves no room for its context in {limit} tokens")
        survey.labels = Counter("answerable" if texts else "unanswerable" for *_, (texts, _) in rows)
        survey.faults = faults_at(faults, places)
        return survey

    def settle(self, survey: Survey, types: Mapping[str, pa.DataType]) -> list[str]:
        """Whether no answer is one that the model may give."""
        self.settled = {"unanswerable": survey.labels["unanswerable"] > 0}
        if survey.labels and not survey.labels["answerable"]:
            return ["no training row has an answer; there is nothing to learn"]
        return []

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Windows over contexts; see the class. Counted as cut: rows whose answer is whole in no window.

        Of these nothing is learnt.
        """
        from hfbatch.train.rows import ROW

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
        """Padded tokens; labels int64 [batch, 3]."""
        import torch

        batch = self.task.collate(features, np.arange(len(features)), 1)
        batch["labels"] = (
            flatten(features["labels"]).flatten().to_numpy().reshape(-1, LABELS).astype(np.int64)
        )
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the first and the last token, the mean of both, over the tokens of a window.

        As transformers has it, but that padding takes no part: it would make a row's loss depend on its batch.

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
        """Start and end logits of each window, float32 [2, tokens of the batch's longest]."""
        import torch

        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        loss = float(self.loss(outputs, batch["labels"], 1))
        ends = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu().numpy()
        return Predicted(list(ends), loss, int(batch["labels"].ne(IGNORED).sum()))

    def score(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, float]:
        """exact_match and f1 of each question's best span over its windows, chosen as the task does."""
        return answer_scores(
            features["answers"].drop_null().to_pylist(), self._answers(predictions, features)
        )

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """The loss of each window, 0 where nothing is learnt of it; its question's answer and the right ones."""
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
        """The best answer to each question."""
        self.task.params = self.task.params.model_copy(
            update={"handle_impossible_answer": self.settled["unanswerable"]}
        )
        first = features["context"].is_valid().to_numpy()
        windows = np.bincount(np.cumsum(first) - 1)
        outputs = pa.table(
            {name: lists_of(values, windows) for name, values in self._spans(predictions, features)}
        )
        contexts = features["context"].drop_null()
        found = self.task.postprocess(outputs, {"context": contexts})[0].to_pylist()
        return [row[0]["answer"] for row in found]

    def _spans(self, predictions: list[np.ndarray], features: pa.Table) -> list[tuple[str, pa.Array]]:
        """The best span of each window: what the task's forward returns."""
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
        """No answer to every question, where training has such."""
        if not self.settled["unanswerable"]:
            return {}
        answers = features["answers"].drop_null().to_pylist()
        return answer_scores(answers, [""] * len(answers))


def window_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean cross-entropy of a window's first and last token.

    :param logits: float [2, tokens], padding behind.
    :param labels: first, last, and number of tokens; IGNORED for a window of which nothing is learnt.
    """
    from scipy.special import log_softmax

    first, last, size = labels.tolist()
    if size == IGNORED:
        return 0.0
    shares = log_softmax(logits[:, :size].astype(np.float64), axis=1)
    return float(-(shares[0, first] + shares[1, last]) / 2)


def answers_of(columns: Mapping[str, pa.Array]) -> list[Any]:
    """`Answers` of each row as it has them: nulls included, faults as well."""
    answers = columns["answers"].to_pylist()
    if pa.types.is_struct(columns["answers"].type):
        return [(row and row["text"], row and row["answer_start"]) for row in answers]
    return list(zip(answers, columns["answer_starts"].to_pylist(), strict=True))


def fault_of(
    question: str | None, context: str | None, answers: tuple[list[Any] | None, list[Any] | None]
) -> str:
    """What is wrong with a row; empty if nothing is."""
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
    """Where the first answer of each row stands in its windows.

    :param start: first character of each window's tokens, OUTSIDE for what is none of the context; `end` one behind
        the last.
    :param owner: the row of each window, int64 [windows].
    :returns: first and last token of the answer and number of tokens of the window, int64 [windows, 3]: NOWHERE twice
        where the window has not the whole answer, IGNORED where no window of the row has; and which rows these
        are, bool [rows].
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
    """The lowest low and the highest high of each group, int64 [count, 2]; the highest is -1 for an empty one."""
    found = np.tile([np.iinfo(np.int64).max, -1], (count, 1))
    np.minimum.at(found[:, 0], group, low)
    np.maximum.at(found[:, 1], group, high)
    return found
