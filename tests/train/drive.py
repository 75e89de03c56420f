"""Takes a recipe through its steps by hand: without Ray, without Trainer, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hfbatch.data.media import NO_FILES
from hfbatch.data.media_files import RowFiles
from hfbatch.hub.models import pin
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.train.data.rows import EPOCH
from hfbatch.train.loop.model import build_model
from hfbatch.train.loop.training import collator
from hfbatch.train.loop.worker_config import build_recipe
from hfbatch.train.recipes.base import DatasetStatistics, Recipe

Columns = Mapping[str, Sequence[Any] | pa.Array]


class Bench:
    """A recipe with rows and a model.

    :param folder: of the model.
    :param columns: the recipe's columns of all rows.
    :param files: that rows may name.
    :param options: further parts of the spec.
    """

    def __init__(
        self, task: str, folder: str | Path, columns: Columns, files: RowFiles = NO_FILES, **options: Any
    ) -> None:
        self.spec = FinetuneSpec.build(
            {"task": task, "model": str(folder), "train": "rows", "output": "out", **options}
        )
        self.columns = {
            name: values if isinstance(values, pa.Array) else pa.array(values)
            for name, values in columns.items()
        }
        rows = len(next(iter(self.columns.values())))
        self.places = pa.table({"file": ["rows.parquet"] * rows, "row": range(rows)})
        self.files, self.base = files, pin(self.spec.model, weights=not self.spec.model.scratch)
        self.recipe: Recipe = build_recipe(self.spec, self.base, files=files)

    def validate(self) -> DatasetStatistics:
        """Statistics of the rows, and faults of single rows."""
        return self.recipe.validate(self.columns, self.places)

    def fit(self) -> list[str]:
        """Fits the recipe to the rows. :returns: faults of all rows together."""
        types, found = {name: array.type for name, array in self.columns.items()}, self.validate()
        self.recipe = build_recipe(self.spec, self.base, self.recipe.fit(found, types), self.files)
        return self.recipe.train_faults(found, types)

    def ready(self) -> Bench:
        """The same, fitted, with features and the model in eval mode; fails on any fault."""
        assert [*self.validate().faults, *self.fit(), *self.recipe.check()] == []
        self.features = self.recipe.features(self.columns, self.places).table
        self.model = build_model(self.spec, self.recipe).eval()
        self.collate = collator(self.recipe, self.model)(_Rows(self.features))  # type: ignore[arg-type]
        return self

    def batch(self, *numbers: int) -> dict[str, torch.Tensor]:
        """Rows as a batch; all of them where none is named."""
        return self.collate(list(numbers) or list(range(len(self.features))))

    def loss(self, batch: dict[str, torch.Tensor], items: int | None = None) -> torch.Tensor:
        """The recipe's loss of a batch."""
        outputs = self.model(**{name: value for name, value in batch.items() if name != "labels"})
        return self.recipe.loss(outputs, batch["labels"], items)

    def learn(self, steps: int = 30, rate: float = 5e-3) -> tuple[float, float]:
        """Plain AdamW on all rows at once. :returns: the first loss and the last."""
        optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=rate)
        losses = []
        for _ in range(steps):
            loss = self.loss(self.batch())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1]

    def metrics(self, size: int = 4) -> dict[str, float]:
        """Metrics of all rows, predicted in batches of a size."""
        return self.recipe.score(self.predictions(size), self.features)

    def predictions(self, size: int = 4) -> list[Any]:
        """What the recipe predicts of each row, in batches of a size."""
        found: list[Any] = []
        with torch.no_grad():
            for start in range(0, len(self.features), size):
                numbers = range(start, min(start + size, len(self.features)))
                found += self.recipe.predict(self.model.eval(), self.batch(*numbers)).predictions
        return found


class _Rows:
    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def take(self, numbers: list[int]) -> pa.Table:
        epochs, places = np.divmod(numbers, len(self.table))
        return self.table.take(pa.array(places)).combine_chunks().append_column(EPOCH, pa.array(epochs))
