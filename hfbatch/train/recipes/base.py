"""What a recipe is: the contract between rows with labels, training batches and metrics. Knows nothing of Ray and files.

A recipe goes with the task of the same name, and reads a row as that task does: what a model learns from is
what it will be given. A row passes through it in five places:

    examine     CPU      columns           -> Survey          labels and faults, before any work
    features    CPU      columns           -> features        the task's own, with the targets beside them
    collate     CPU      features          -> batch           tensors as the model takes them, with `labels`
    loss        device   model's outputs   -> sum / items     the same however a step is cut into batches
    predict     device   batch             -> predictions     one for each row of the features
    score       driver   predictions       -> metrics
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.finetune_spec import TrainBatchSpec
from hfbatch.tasks.base import Features, InputColumn, Params, Task

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of what is not learnt, such as padding: torch's cross-entropy leaves it out."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "wer", "cer", "mse", "mae"})
"""Metrics of which less is more."""
MOST_FAULTS = 20
"""Faults that are told, of each split."""


@dataclass
class Survey:
    """What rows hold, before anything is made of them."""

    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """How often each label occurs."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with which row."""
    hashes: list[np.ndarray] = field(default_factory=list)
    """Of what rows hold, where some are set aside to measure with."""

    def add(self, other: Survey) -> None:
        """Takes in what was found elsewhere."""
        self.rows += other.rows
        self.labels += other.labels
        self.faults += other.faults
        self.hashes += other.hashes


@dataclass(frozen=True)
class Predicted:
    """What a model made of a batch."""

    predictions: list[Any]
    """One for each row: an array, a text or a dict; small, since those of all rows go to one process."""
    loss: float
    """Sum over `items`."""
    items: int
    """What the loss is the sum over: rows or tokens."""


class Recipe(ABC):
    """How a model learns one task."""

    name: ClassVar[str]
    auto_class: str
    """The transformers AutoClass that loads the model."""
    columns: ClassVar[tuple[InputColumn, ...]]
    """What it reads: inputs of the task, and targets."""
    Params: ClassVar[type[Params]] = Params
    numbered: ClassVar[Mapping[str, str]] = {}
    """Columns that may hold numbers of classes, and the param that names these."""
    in_both: ClassVar[tuple[str, ...]] = ()
    """Optional columns that both sets of rows have, or neither."""
    scored: ClassVar[tuple[str, ...] | None] = None
    """Columns of the features that `score`, `details` and `baseline` read; None: all of them. The first process has
    them in memory for all rows to measure with."""
    methods: ClassVar[tuple[str, ...]] = ("full", "head", "lora", "qlora")
    """Methods of training that make sense."""

    def __init__(
        self, task: Task, params: Any, label_smoothing: float = 0.0, settled: Mapping[str, Any] | None = None
    ) -> None:
        self.task = task
        self.params = params
        self.label_smoothing = label_smoothing
        self.settled: dict[str, Any] = dict(settled or {})
        """What `settle` found in the training rows, in plain values: workers are given it."""
        self.batch = TrainBatchSpec()
        """What one step sees, for recipes whose loss has a part in it."""

    @property
    def labels(self) -> list[str]:
        """Names by class index; empty for a recipe without classes, and before `settle`."""
        return self.settled.get("labels", [])

    @property
    def notes(self) -> list[str]:
        """What to mind about the rows; known after `settle`."""
        return []

    @property
    @abstractmethod
    def metric(self) -> str:
        """What decides which checkpoint is the best, unless the spec says."""

    @property
    def group(self) -> int:
        """How many rows that follow each other are learnt together; one pass of all workers holds whole groups."""
        return 1

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what `score` may return beside the loss, after `settle`."""

    def metric_faults(self, asked: str | None) -> list[str]:
        """What is wrong with the metric that the spec asks for."""
        if asked in (None, "loss", *self.metrics):
            return []
        return [f"evaluation.metric {asked!r} is none of: {', '.join((*self.metrics, 'loss'))}"]

    @property
    def processor(self) -> Any:
        """What is saved beside the model: a tokenizer as its files have it, with the spec's changes."""
        return self.task.load_tokenizer()

    def complete(self, folder: Path) -> None:  # noqa: B027 - most models need no more
        """Adds what else belongs into the folder of the finished model, which has its weights and config."""

    def check(self) -> list[str]:
        """What is wrong with params or model, one sentence each with the fix. No row is read."""
        return self.task.check()

    def choose(self, found: Mapping[str, str], mapped: set[str]) -> dict[str, str]:
        """The columns that are read: by default, all that were found.

        :param found: column of the recipe to column of the rows.
        :param mapped: those of the recipe that the spec names.
        """
        return dict(found)

    def column_faults(self, present: set[str]) -> list[str]:
        """What is wrong with the set of columns that the dataset has, beyond required ones that lack."""
        return []

    def type_faults(self, train: Mapping[str, pa.DataType], measured: Mapping[str, pa.DataType]) -> list[str]:
        """What does not go together in the columns to learn from and those to measure with.

        :raises SpecError: for columns that do not go with params.
        """
        lacking = [name for name in self.in_both if (name in train) != (name in measured)]
        return [
            f"{'train' if name in train else 'eval'} has {name!r} and the other has not; give both a --column {name}=COLUMN, "
            "or neither"
            for name in lacking
        ]

    @abstractmethod
    def examine(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Survey:
        """Counts labels and finds rows that cannot be learnt from.

        :param columns: column of the recipe to array, nulls included.
        :param places: `file` (string) and `row` (int64) of each row.
        """

    def settle(self, survey: Survey, types: Mapping[str, pa.DataType]) -> list[str]:
        """Fixes `settled` by all training rows; returns what is wrong with them taken together.

        :param types: of the recipe's columns.
        """
        return []

    def eval_faults(self, survey: Survey) -> list[str]:
        """What is wrong with the rows to measure with: by default, labels that are not in training."""
        unknown = sorted(set(survey.labels) - set(self.labels)) if self.labels else []
        if not unknown:
            return []
        shown = ", ".join(map(repr, unknown[:5]))
        return [
            f"eval holds labels that no training row has: {shown} (training has: {', '.join(self.labels[:20])}); leave "
            "these rows out with eval.filter, or add such rows to train"
        ]

    @property
    def known_labels(self) -> list[str]:
        """Labels of the model to train, in the order of its logits: a head that knows them is not to learn them anew."""
        return [name for _, name in sorted(self.task.config.id2label.items())]

    def config_changes(self) -> dict[str, Any]:
        """Fields of the model's config that the labels decide."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    @abstractmethod
    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Turns rows into features: at least one row each, with the targets and whatever `score` needs."""

    def lengths(self, features: pa.Table) -> np.ndarray:
        """What each row of the features costs, int64 [rows]."""
        return self.task.lengths(features)

    @abstractmethod
    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Rows as one padded batch, with `labels`; what is IGNORED of these counts for nothing."""

    def prepare(self, model: Any) -> None:  # noqa: B027 - most models are ready
        """Changes the model itself beside its config, before adapters wrap it: options, hooks.

        Hooks belong on `model.base_model` or below: adapters call the forward of the model itself past them.
        """

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy of `outputs.logits` [..., classes], float32.

        A sum divided by the items of the whole step, so that neither accumulation nor the number of workers
        changes it: means of unequal parts would.

        :param labels: int64 [...], IGNORED where there is nothing to learn.
        :param num_items_in_batch: labels of the step, over all batches and workers; None for those of this batch.
        """
        from torch.nn.functional import cross_entropy

        logits = outputs.logits.float()
        total = cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return total / items_of(labels, num_items_in_batch)

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Logits of each row, float32. Runs under no_grad, the model in eval mode.

        :param batch: of `collate`, on the model's device.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs, items = model(**inputs), int(batch["labels"].ne(IGNORED).sum())
        loss = float(self.loss(outputs, batch["labels"], 1))
        return Predicted(list(outputs.logits.float().cpu().numpy()), loss, items)

    @abstractmethod
    def score(self, predictions: list[Any], features: pa.Table) -> dict[str, float]:
        """Metrics; `metric` is one of them.

        :param predictions: one for each row of the features, in their order.
        """

    def details(self, predictions: list[Any], features: pa.Table) -> dict[str, Any]:
        """What the report shows of single rows, in plain values; each of these may be left out.

        - `losses`: float of each row of the features; the report shows the highest ones
        - `guesses`, `truths`: texts of each row of the features, shown beside its loss
        - `confusion`: `labels`, and `counts`, rows by truth and guess

        :param predictions: as for `score`.
        """
        return {}

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Metrics of a guess without a model, such as the commonest label; none where no such guess makes sense.

        :param features: of the rows to measure with; what training rows hold is in `settled`.
        """
        return {}


def items_of(labels: torch.Tensor, step: torch.Tensor | int | None) -> torch.Tensor | int:
    """What a loss is divided by: the labels of the step, or of this batch where `step` is None; 1 at least.

    A step of rows in which there is nothing to learn, such as texts of unknown words for fill-mask, has the loss 0.
    """
    items = labels.ne(IGNORED).sum() if step is None else step
    return max(items, 1) if isinstance(items, int) else items.clamp(min=1)


def faulty_rows(found: Mapping[str, np.ndarray], places: pa.Table) -> list[str]:
    """Sentences that name rows.

    :param found: what is wrong, and with which rows, bool [rows].
    """
    sentences = []
    for fault, rows in found.items():
        positions = np.flatnonzero(rows)
        for position in positions[:MOST_FAULTS].tolist():
            place = places.slice(position, 1).to_pylist()[0]
            sentences.append(f"{place['file']} row {place['row']}: {fault}")
        if len(positions) > MOST_FAULTS:
            sentences.append(f"… and {len(positions) - MOST_FAULTS} more rows where {fault}")
    return sentences


def faults_at(found: Mapping[int, str], places: pa.Table) -> list[str]:
    """Sentences that name rows. :param found: what is wrong with a row, by its position."""
    sentences = []
    for position in sorted(found)[:MOST_FAULTS]:
        place = places.slice(position, 1).to_pylist()[0]
        sentences.append(f"{place['file']} row {place['row']}: {found[position]}")
    if len(found) > MOST_FAULTS:
        sentences.append(f"… and {len(found) - MOST_FAULTS} more faulty rows")
    return sentences
