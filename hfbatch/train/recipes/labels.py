"""Base class of recipes for labels: one label, several labels, or a number for each row."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.errors import SpecError
from hfbatch.tasks.base import Features, InputColumn, Params
from hfbatch.tasks.tokens import is_text, lists_of
from hfbatch.train.metrics.classification import METRICS, multi_label, regression, single_label
from hfbatch.train.metrics.per_example import label_details, labels_details, number_details
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, Recipe, faulty_rows

if TYPE_CHECKING:
    import torch

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""Kinds of label, and their names in the configs of transformers (problem_type)."""


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LabelTraining(Params):
    """How labels are read and weighted."""

    kind: Literal["auto", "single", "multi", "regression"] = "auto"
    """single: one of several; multi: any number of them; regression: a number. auto: decided by the column's type."""
    label_names: tuple[str, ...] | None = None
    """Names of labels that are integers, from 0; default: those in the Parquet files, else the numbers."""
    class_weights: Literal["balanced"] | dict[str, Weight] | None = Field(default=None)
    """Weight of each label's rows in the loss, such as {spam: 5}; balanced: inversely proportional to its frequency."""


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_label(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds labels: names, numbers, or lists of names or of integers."""
    if is_list(kind):
        return is_text(kind.value_type) or pa.types.is_integer(kind.value_type)
    return (
        is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    )


LABEL = InputColumn(
    "label", is_label, "string, integer, float, or list<string> or list<integer> of the labels that a row has"
)


class LabelRecipe(Recipe):
    """Base class of recipes for labels. Subclasses define the input and check it."""

    Params: ClassVar[type[Params]] = LabelTraining
    numbered: ClassVar[Mapping[str, str]] = {"label": "label_names"}
    scored: ClassVar[tuple[str, ...]] = ("labels",)
    params: LabelTraining

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint, by kind of label."""
        return {"single": "accuracy", "multi": "f1_micro", "regression": "pearson"}[self.fitted["kind"]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics for the kind of label."""
        return METRICS[self.fitted["kind"]]

    @abstractmethod
    def input_faults(self, columns: Mapping[str, pa.Array]) -> dict[str, np.ndarray]:
        """Checks the inputs; maps each fault to the rows that have it, bool [rows]."""

    @abstractmethod
    def inputs(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Collates the inputs of rows into one batch, without labels."""

    def kind_of(self, kind: pa.DataType) -> str:
        """Returns the kind of labels of this type: single, multi or regression. :raises SpecError: if params differ."""
        asked = self.params.kind
        if asked == "auto":
            return "multi" if is_list(kind) else "regression" if pa.types.is_floating(kind) else "single"
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if is_list(kind) != (asked == "multi") or (asked == "regression" and not number):
            raise SpecError(f"params.kind is {asked}, but the labels are of type {kind}; leave it out")
        return asked

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Counts labels; reports null or invalid labels and unusable inputs as faults."""
        kind, names = self.kind_of(columns["label"].type), self.params.label_names
        label = self._label(columns)
        beyond = "" if names is None else f" or a number beyond the {len(names)} of params.label_names"
        found = {f"label is null{beyond}": pc.is_null(label, nan_is_null=True).to_numpy(zero_copy_only=False)}
        if pa.types.is_floating(label.type):
            found["label is infinite, or too large for float32; use finite numbers"] = np.isinf(
                label.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
            )
        if kind == "single":
            empty = pc.equal(pc.utf8_length(label.cast(pa.string())), 0).fill_null(False)
            found["label is empty"] = empty.to_numpy(zero_copy_only=False)
        if kind == "multi":
            found[f"label holds a null{beyond}"] = holds_null(label)
            found["label holds one twice; give the labels of the row, not a vector of 0 and 1"] = holds_twice(
                label
            )
        faults = faulty_rows({**found, **self.input_faults(columns)}, places)
        if kind == "regression":
            return DatasetStatistics(len(places), Counter(), faults)
        return DatasetStatistics(
            len(places), Counter(names_of(label.flatten() if kind == "multi" else label)), faults
        )

    def fit(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
        """Returns `kind`, `labels` and their `counts`. The order is the model's if it has them all, else by value."""
        kind, counts = self.kind_of(types["label"]), dict(statistics.labels)
        if kind == "regression":
            return {"kind": kind, "labels": [], "counts": counts}
        known = self.params.label_names or self.known_labels
        labels = sorted(counts, key=known.index if counts.keys() <= set(known) else by_value)
        return {"kind": kind, "labels": labels, "counts": counts}

    def train_faults(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> list[str]:
        """Checks that the rows have at least two labels, and that the params are for their kind and name no others."""
        kind = self.fitted["kind"]
        if self.label_smoothing and kind != "single":
            return ["schedule.label_smoothing is for rows of one label each; leave it out"]
        if self.params.label_names and pa.types.is_floating(types["label"]):
            return [f"params.label_names is for whole numbers, but label is {types['label']}; leave it out"]
        if kind == "regression":
            weights = self.params.class_weights
            return ["params.class_weights: a number has no classes; leave it out"] if weights else []
        faults = []
        present = [label for label in self.labels if statistics.labels[label]]
        if len(present) < 2:
            faults.append(
                f"all training rows have the same label {present[0] if present else None!r}; there is nothing to train "
                "on"
            )
        if isinstance(self.params.class_weights, dict):
            unknown = sorted(set(self.params.class_weights) - set(self.labels))
            faults += [
                f"params.class_weights names {name!r}, which no row has (labels: {', '.join(self.labels)})"
                for name in unknown
            ]
        return faults

    def type_faults(self, train: Mapping[str, pa.DataType], measured: Mapping[str, pa.DataType]) -> list[str]:
        """Checks that the labels of the evaluation set are of the same kind as those of the training set."""
        faults = super().type_faults(train, measured)
        kinds = [self.kind_of(types["label"]) for types in (train, measured)]
        if kinds[0] != kinds[1]:
            faults.append(
                f"label is {train['label']} in train ({kinds[0]}) but {measured['label']} in eval ({kinds[1]}); make them the "
                "same, or set params.kind"
            )
        return faults

    def config_changes(self) -> dict[str, Any]:
        """Returns the labels and their `problem_type`, which selects the loss in transformers."""
        labels = super().config_changes() or {
            "num_labels": 1,
            "id2label": {0: "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
        return {**labels, "problem_type": PROBLEM_TYPES[self.fitted["kind"]]}

    def _label(self, columns: Mapping[str, pa.Array]) -> pa.Array:
        """Replaces integer labels by their names, if these are known; a number without a name becomes null."""
        label, names = columns["label"], self.params.label_names
        plain = label.type.value_type if is_list(label.type) else label.type
        if names is None or self.params.kind == "regression" or not pa.types.is_integer(plain):
            return label
        if not is_list(label.type):
            return named(label, names)
        lists = lists_of(named(label.flatten(), names), pc.list_value_length(label).fill_null(0).to_numpy())
        return pc.if_else(pc.is_null(label), None, lists)

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns the task's features and `labels`: int64, list<float32> (multi-hot), or float32."""
        made = self.task.preprocess(columns, places)
        return Features(made.table.append_column("labels", self._targets(self._label(columns))), made.cut)

    def _targets(self, label: pa.Array) -> pa.Array:
        if self.fitted["kind"] == "regression":
            values = label.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
            # IGNORED marks rows without a target, so a value equal to it is replaced by the next float32.
            return pa.array(np.where(values == IGNORED, np.nextafter(values, np.float32(0)), values))
        index = {name: place for place, name in enumerate(self.labels)}
        if self.fitted["kind"] == "single":
            return pa.array([index[name] for name in names_of(label)], pa.int64())
        hot = np.zeros((len(label), len(index)), np.float32)
        rows = pc.list_parent_indices(label).to_numpy()
        hot[rows, [index[name] for name in names_of(label.flatten())]] = 1
        return pa.array(list(hot), pa.list_(pa.float32()))

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Collates inputs and labels: int64 [batch], float32 [batch, labels] or float32 [batch]."""
        import torch

        labels = torch.from_numpy(np.array(features["labels"].to_pylist()))
        return {
            **self.inputs(features),
            "labels": labels.float() if labels.is_floating_point() else labels,
        }

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Computes cross-entropy, binary cross-entropy per label, or squared error, with the class weights."""
        import torch
        from torch.nn import functional

        counted = labels.ne(IGNORED)
        items = counted.sum() if num_items_in_batch is None else num_items_in_batch
        logits = outputs.logits.float()
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        if self.fitted["kind"] == "single":
            smoothing = self.label_smoothing
            total = functional.cross_entropy(
                logits, labels, weights, reduction="sum", label_smoothing=smoothing
            )
            return total / items
        if self.fitted["kind"] == "multi":
            each = functional.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
        else:
            each = functional.mse_loss(logits.squeeze(-1), labels, reduction="none")
        return each[counted].sum() / items

    @property
    def weights(self) -> list[float] | None:
        """Weights by class index; balanced: rows / (classes × rows of the class), as sklearn's `class_weight` does.

        A class without training rows has weight 1.
        """
        asked, counts = self.params.class_weights, self.fitted["counts"]
        if asked is None:
            return None
        if asked == "balanced":
            each = sum(counts.values()) / sum(map(bool, counts.values()))
            return [each / counts[name] if counts[name] else 1.0 for name in self.labels]
        return [asked.get(name, 1.0) for name in self.labels]

    def score(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, float]:
        """Computes the metrics for the kind of label."""
        logits, labels = np.stack(predictions), np.array(features["labels"].to_pylist())
        if self.fitted["kind"] == "regression":
            return regression(logits[:, 0], labels)
        return multi_label(logits, labels) if self.fitted["kind"] == "multi" else single_label(logits, labels)

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """Returns losses, predicted and true labels of the rows; for single labels, also the confusion matrix."""
        logits, labels = np.stack(predictions), np.array(features["labels"].to_pylist())
        if self.fitted["kind"] == "regression":
            return number_details(logits[:, 0], labels)
        of = labels_details if self.fitted["kind"] == "multi" else label_details
        return of(logits, labels, self.labels)

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Predicts the most frequent label of the training set for each row."""
        if self.fitted["kind"] != "single":
            return {}
        most = max(range(len(self.labels)), key=lambda place: self.fitted["counts"][self.labels[place]])
        labels = np.array(features["labels"].to_pylist())
        return {"accuracy": float((labels == most).mean())}


def named(numbers: pa.Array, names: Sequence[str]) -> pa.Array:
    """Maps numbers, from 0, to names; null for a number without a name, such as the -1 of `datasets`."""
    known = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names)))
    return pa.array(names, pa.string()).take(pc.if_else(known, numbers, None))


def names_of(labels: pa.Array) -> list[str]:
    """Converts labels to names: numbers and booleans as text, 1.0 as 1; drops nulls."""
    values = [value for value in labels.to_pylist() if value is not None]
    return [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in values]


def holds_null(lists: pa.Array) -> np.ndarray:
    """Returns which lists contain a null, bool [rows]."""
    nulls = pc.is_null(lists.flatten()).to_numpy(zero_copy_only=False)
    found = np.zeros(len(lists), bool)
    found[pc.list_parent_indices(lists).to_numpy()[nulls]] = True
    return found


def holds_twice(lists: pa.Array) -> np.ndarray:
    """Returns which lists contain a value more than once, bool [rows]."""
    pairs = pa.table({"row": pc.list_parent_indices(lists), "value": lists.flatten()})
    counts = pairs.group_by(["row", "value"]).aggregate([([], "count_all")])
    found = np.zeros(len(lists), bool)
    found[counts.filter(pc.field("count_all") > 1)["row"].to_numpy()] = True
    return found


def by_value(name: str) -> tuple[int, float, str]:
    """Sort key: names that are numbers come first, by value."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
