"""The base class of recipes: the interface between labelled rows, training batches and metrics. Does not import Ray.

A recipe belongs to the task of the same name and reads rows as that task does, so that training and prediction see
the same inputs. These methods process a row, in this order:

    validate    CPU      columns           -> statistics      before any work, of which `fit` makes labels and the like
    features    CPU      columns           -> features        those of the task, plus the targets
    collate     CPU      features          -> batch           the model's input tensors, with `labels`
    loss        device   model's outputs   -> sum / items     independent of how a step is split into batches
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

from hfbatch.spec.finetune import TrainBatchSpec
from hfbatch.tasks import base, task_class
from hfbatch.tasks.base import Features, InputColumn, Params, Task

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of positions without a target, such as padding; torch's cross-entropy ignores it."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "wer", "cer", "mse", "mae"})
"""Metrics for which lower values are better."""
MOST_FAULTS = 20
"""Maximum number of faults that are reported for each split."""


@dataclass
class DatasetStatistics:
    """Statistics and faults of raw rows, before they become features."""

    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    """Number of occurrences of each label."""
    faults: list[str] = field(default_factory=list)
    """Messages that name a row and what is wrong with it."""
    hashes: list[np.ndarray] = field(default_factory=list)
    """Hashes of the rows' contents, if an evaluation set is held out of them."""

    def add(self, other: DatasetStatistics) -> None:
        """Adds the statistics and faults of other rows."""
        self.rows += other.rows
        self.labels += other.labels
        self.faults += other.faults
        self.hashes += other.hashes


@dataclass(frozen=True)
class Predicted:
    """A model's predictions and loss for a batch."""

    predictions: list[Any]
    """One for each row: an array, a text or a dict. Keep them small: one process collects those of all rows."""
    loss: float
    """Sum over `items`."""
    items: int
    """Number of rows or tokens that the loss is summed over."""


class Recipe(ABC):
    """Defines how a model is trained on one task."""

    name: ClassVar[str]
    auto_class: str
    """The transformers AutoClass that loads the model."""
    columns: ClassVar[tuple[InputColumn, ...]]
    """Columns that are read: inputs of the task, and targets."""
    Params: ClassVar[type[Params]] = Params
    numbered: ClassVar[Mapping[str, str]] = {}
    """Columns that may hold class indices, and the param that gives the class names."""
    in_both: ClassVar[tuple[str, ...]] = ()
    """Optional columns that must be in both the training and the evaluation set, or in neither."""
    scored: ClassVar[tuple[str, ...] | None] = None
    """Columns of the features that `score`, `details` and `baseline` read; None: all of them. The first process holds
    them in memory for the whole evaluation set."""
    methods: ClassVar[tuple[str, ...]] = ("full", "head", "lora", "qlora")
    """Training methods that this task supports."""

    def __init__(
        self,
        task: Task,
        params: Any,
        label_smoothing: float = 0.0,
        batch: TrainBatchSpec | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = task
        """The task, built with `task_params`."""
        self.params = params
        self.label_smoothing = label_smoothing
        self.batch = batch or TrainBatchSpec()
        """Batch settings, for recipes whose loss depends on them."""
        self.fitted: Mapping[str, Any] = dict(fitted or {})
        """What `fit` returned for the training set, such as the labels; empty before the rows are validated."""

    @classmethod
    def task_params(cls, params: Any, max_length: int | None, fitted: Mapping[str, Any]) -> base.Params:
        """Returns the params of the task with which a model is trained and evaluated: by default, the defaults.

        :param params: the recipe's params.
        :param max_length: the spec's limit of tokens.
        :param fitted: what `fit` returned; empty before the rows are validated.
        """
        return task_class(cls.name).Params()

    @property
    def labels(self) -> list[str]:
        """Names by class index; empty for a recipe without classes, and before the training set is validated."""
        return self.fitted.get("labels", [])

    @property
    def notes(self) -> list[str]:
        """Remarks about the training set for the user; available once it is validated."""
        return []

    @property
    @abstractmethod
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint, unless the spec names another."""

    @property
    def group(self) -> int:
        """Number of consecutive rows whose loss is computed together; a pass of all workers has whole groups."""
        return 1

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics besides the loss that `score` may return; available once the rows are validated."""

    def metric_faults(self, asked: str | None) -> list[str]:
        """Checks the metric that the spec asks for."""
        if asked in (None, "loss", *self.metrics):
            return []
        return [f"evaluation.metric {asked!r} is none of: {', '.join((*self.metrics, 'loss'))}"]

    @property
    def processor(self) -> Any:
        """The tokenizer or processor to save with the model: as loaded from its files, with the spec's changes."""
        return self.task.load_tokenizer()

    def complete(self, folder: Path) -> None:  # noqa: B027 - most models need no more
        """Writes further files into the folder of the finished model, which has its weights and config."""

    def check(self) -> list[str]:
        """Checks params and model without reading rows; returns one sentence with the fix for each fault."""
        return self.task.check()

    def choose(self, found: Mapping[str, str], mapped: set[str]) -> dict[str, str]:
        """Selects the columns to read: by default, all that were found.

        :param found: maps columns of the recipe to columns of the dataset.
        :param mapped: columns of the recipe that the spec maps.
        """
        return dict(found)

    def column_faults(self, present: set[str]) -> list[str]:
        """Checks which columns the dataset has; missing required columns are reported elsewhere."""
        return []

    def type_faults(self, train: Mapping[str, pa.DataType], measured: Mapping[str, pa.DataType]) -> list[str]:
        """Checks that the columns of the training and the evaluation set are consistent.

        :raises SpecError: for columns that are inconsistent with params.
        """
        lacking = [name for name in self.in_both if (name in train) != (name in measured)]
        return [
            f"{'train' if name in train else 'eval'} has {name!r} and the other has not; give both a --column {name}=COLUMN, "
            "or neither"
            for name in lacking
        ]

    @abstractmethod
    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Counts rows and labels, and finds rows that cannot be used for training.

        :param columns: maps columns of the recipe to arrays, nulls included.
        :param places: `file` (string) and `row` (int64) of each row.
        """

    def fit(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
        """Derives labels and the like from the training set; a recipe that is built with them is the fitted one.

        :param statistics: those of the training set.
        :param types: types of the recipe's columns.
        :returns: plain values, which are sent to the workers as JSON.
        """
        return {}

    def train_faults(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> list[str]:
        """Checks the training set as a whole, such as that it has several labels; for a fitted recipe.

        :param statistics: those that the recipe was fitted to; `types`: as for `fit`.
        """
        return []

    def eval_faults(self, statistics: DatasetStatistics) -> list[str]:
        """Checks the evaluation set: by default, reports labels that do not occur in the training set.

        For a fitted recipe.

        :param statistics: those of the evaluation set.
        """
        unknown = sorted(set(statistics.labels) - set(self.labels)) if self.labels else []
        if not unknown:
            return []
        shown = ", ".join(map(repr, unknown[:5]))
        return [
            f"eval holds labels that no training row has: {shown} (training has: {', '.join(self.labels[:20])}); leave "
            "these rows out with eval.filter, or add such rows to train"
        ]

    @property
    def known_labels(self) -> list[str]:
        """Labels of the base model in the order of its logits, so that a head trained on them keeps its weights."""
        return [name for _, name in sorted(self.task.config.id2label.items())]

    def config_changes(self) -> dict[str, Any]:
        """Returns the fields of the model's config that depend on the labels."""
        if not self.labels:
            return {}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    @abstractmethod
    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Converts rows to features: at least one row each, with the targets and the columns that `score` needs."""

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the length of each row of the features, such as its tokens: int64 [rows]."""
        return self.task.lengths(features)

    @abstractmethod
    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Collates rows into one padded batch with `labels`; labels that are IGNORED do not enter the loss."""

    def prepare(self, model: Any) -> None:  # noqa: B027 - most models are ready
        """Modifies the model (options, hooks) before adapters wrap it.

        Register hooks on `model.base_model` or below: adapters call the model's forward without its own hooks.
        """

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes the cross-entropy of `outputs.logits` [..., classes], float32.

        It is the sum divided by the number of items of the whole step, so that it depends neither on gradient
        accumulation nor on the number of workers, as a mean of means over unequal parts would.

        :param labels: int64 [...], IGNORED where there is no target.
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
        """Returns the logits of each row, float32. Runs under no_grad with the model in eval mode.

        :param batch: returned by `collate`, on the model's device.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs, items = model(**inputs), int(batch["labels"].ne(IGNORED).sum())
        loss = float(self.loss(outputs, batch["labels"], 1))
        return Predicted(list(outputs.logits.float().cpu().numpy()), loss, items)

    @abstractmethod
    def score(self, predictions: list[Any], features: pa.Table) -> dict[str, float]:
        """Computes the metrics, which include `metric`.

        :param predictions: one for each row of the features, in their order.
        """

    def details(self, predictions: list[Any], features: pa.Table) -> dict[str, Any]:
        """Returns per-row details for the report, as plain values. Each key is optional:

        - `losses`: the loss of each row of the features; the report shows the highest ones
        - `guesses`, `truths`: predicted and true values of each row as text, shown next to its loss
        - `confusion`: `labels`, and `counts`, the number of rows by true and predicted label

        :param predictions: as for `score`.
        """
        return {}

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Computes the metrics of a baseline without a model, such as the most frequent label; {} if there is none.

        :param features: those of the evaluation set.
        """
        return {}


def items_of(labels: torch.Tensor, step: torch.Tensor | int | None) -> torch.Tensor | int:
    """Returns the divisor of a loss: the labels of the step, or of this batch if `step` is None; at least 1.

    A step whose rows have no targets, such as texts of unknown words for fill-mask, thus has the loss 0.
    """
    items = labels.ne(IGNORED).sum() if step is None else step
    return max(items, 1) if isinstance(items, int) else items.clamp(min=1)


def faulty_rows(found: Mapping[str, np.ndarray], places: pa.Table) -> list[str]:
    """Returns one message for each faulty row.

    :param found: maps each fault to the rows that have it, bool [rows].
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
    """Returns one message for each faulty row. :param found: the fault of a row, by the row's position."""
    sentences = []
    for position in sorted(found)[:MOST_FAULTS]:
        place = places.slice(position, 1).to_pylist()[0]
        sentences.append(f"{place['file']} row {place['row']}: {found[position]}")
    if len(found) > MOST_FAULTS:
        sentences.append(f"… and {len(found) - MOST_FAULTS} more faulty rows")
    return sentences
