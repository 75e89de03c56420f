"""Takes a task through preprocess, collate, forward and postprocess by hand, without Ray and without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from hfbatch.data.media import NO_FILES
from hfbatch.data.media_files import RowFiles
from hfbatch.engines.base import Capability
from hfbatch.engines.torch import as_array, as_tensor
from hfbatch.hub.models import Model
from hfbatch.runtime.batching import to_arrow
from hfbatch.runtime.windows import carry, fold, unfold
from hfbatch.tasks.base import Features, Task, TaskConfig


def make(
    kind: type[Task],
    folder: str,
    /,
    max_length: int | None = None,
    seed: int = 0,
    files: RowFiles = NO_FILES,
    **params: Any,
) -> Any:
    """A task on the model in folder."""
    model = Model(name=folder, folder=folder, commit="0")
    return kind(TaskConfig(model, kind.Params(**params), max_length, seed, files=files))


def features_of(task: Task, columns: Mapping[str, Sequence[Any]]) -> Features:
    """Preprocesses rows; strings unless an array is given."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    rows = len(next(iter(arrays.values())))
    return task.preprocess(arrays, pa.table({"file": ["rows.parquet"] * rows, "row": range(rows)}))


def load(task: Task) -> torch.nn.Module:
    """The model in float32, as the engine loads it: a copy of its own, as reading the files takes several times longer."""
    files = [path for path in Path(task.model.folder).rglob("*") if path.is_file()]
    stamps = tuple(sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))
    return deepcopy(_loaded(task.auto_class, task.model.folder, stamps))


@lru_cache(maxsize=8)
def _loaded(auto_class: str, folder: str, stamps: tuple[tuple[str, int, int], ...]) -> torch.nn.Module:
    loader = getattr(transformers, auto_class)
    return loader.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


class Asked:
    """A model with no more than the attributes that a task may use by what it asks of an engine."""

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        self.__dict__.update(_model=model, _allowed={"config", "device", "dtype", "forward"})
        if task.asks & {Capability.GENERATE, Capability.COMPLETE}:
            self._allowed.update(("generate", "generation_config"))

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise AttributeError(f"the task does not ask for {name}")
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._model(*args, **options)


def run(
    task: Task,
    columns: Mapping[str, Sequence[Any]],
    size: int | None = None,
    multiple: int = 1,
    order: Sequence[int] | None = None,
) -> pa.Table:
    """Output columns of every row, in input order.

    :param size: of the batches, whose rows are taken in order; default: the first row alone, the others in eights.
    :param order: of the rows, or of their windows where the task has any.
    """
    outputs = forward(task, features_of(task, columns).table, size, multiple, order)
    arrays = task.postprocess(outputs, {name: pa.array(values) for name, values in columns.items()})
    return pa.table(arrays, schema=pa.schema(task.output_fields()))


def forward(
    task: Task,
    features: pa.Table,
    size: int | None = None,
    multiple: int = 1,
    order: Sequence[int] | None = None,
) -> pa.Table:
    """What postprocess gets: outputs of each row in input order, and the features that it reads beside them."""
    model, windows = load(task), unfold(task, features)
    model = model if Capability.MODULE in task.asks else Asked(model, task)
    rows = np.arange(len(windows.table)) if order is None else np.asarray(order)
    tables = []
    with torch.inference_mode():
        starts = [0, *range(1, len(rows), 8)] if size is None else range(0, len(rows), size)
        for places in np.split(rows, starts[1:]):
            batch = task.collate(windows.table, places, multiple)
            outputs = task.forward(model, {name: as_tensor(value) for name, value in batch.items()})
            tables.append(to_arrow({name: as_array(value) for name, value in outputs.items()}, task.ragged))
    outputs = pa.concat_tables(tables).combine_chunks().take(pa.array(np.argsort(rows)))
    outputs = fold(outputs, windows.row) if task.windows else outputs
    return carry(task, outputs, features, np.arange(len(features)))


def measured(task: Task, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """The number that the report draws, of each row."""
    features = features_of(task, columns).table
    outputs = forward(task, features, len(features))
    return task.measure(
        outputs, task.postprocess(outputs, {name: pa.array(v) for name, v in columns.items()})
    )
