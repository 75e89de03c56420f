"""CPU steps before and after the device: rows to features, outputs to columns; failing rows become rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.data.formats.columns import convert, storage_type
from hfbatch.errors import redact_text
from hfbatch.output.rejects import Reject
from hfbatch.runtime.isolate import isolate
from hfbatch.tasks.base import Features, Task
from hfbatch.tasks.tokens import flatten, list_lengths
from hfbatch.tasks.vocabulary import no_embedding

POSITION = "hfbatch_position"
"""The column of features and outputs with the position of each row in the split, int64."""


@dataclass
class Prepared:
    """Features of the accepted rows."""

    features: pa.Table
    """Includes the column POSITION."""
    rejects: list[Reject]
    cut: np.ndarray
    """Which rows of the split were truncated to the length limit, bool [rows]."""


def preprocess(
    task: Task, columns: Mapping[str, pa.Array], places: pa.Table, unreadable: Sequence[Reject] = ()
) -> Prepared:
    """Turns a split's columns into features; a row with a null or an error becomes a reject.

    :param columns: task input to array, as read.
    :param places: `file` and `row` of each row.
    :param unreadable: rejects from reading, which come first in the result.
    """
    columns = _stored(columns)
    nullable = {column.name for column in task.inputs if column.nullable}
    needed = {name: array for name, array in columns.items() if name not in nullable}
    rows, nulls = _without_nulls(needed, len(places), [reject.position for reject in unreadable])
    rejects = [*unreadable, *nulls]

    def run(rows: np.ndarray) -> Features:
        index = pa.array(rows)
        return task.preprocess(
            {name: array.take(index) for name, array in columns.items()}, places.take(index)
        )

    results, failures = isolate(run, rows) if len(rows) else ([], [])
    rejects += [reject(position, "preprocess", error) for position, error in failures]
    tables = [made.table.append_column(POSITION, pa.array(rows)) for rows, made in results]
    cut = np.zeros(len(places), bool)
    for rows_made, made in results:
        if made.cut is not None:
            cut[rows_made] = made.cut
    features = (
        pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        if tables
        else pa.table({POSITION: pa.array([], pa.int64())})
    )
    features, beyond = _embedded(task, features)
    return Prepared(features, rejects + beyond, cut)


def postprocess(
    task: Task, fields: Sequence[pa.Field], outputs: pa.Table, columns: Mapping[str, pa.Array]
) -> tuple[np.ndarray, list[pa.Array], list[Reject]]:
    """Turns outputs into the task's output columns.

    :param fields: the task's `output_fields()`, from the plan, so that this process needs no config.
    :param outputs: with the column POSITION, in input order.
    :param columns: the task's inputs of the whole split.
    :returns: positions of the successful rows, int64 in input order; their columns; rejects of the others.
    """
    if not len(outputs):
        return np.empty(0, np.int64), [pa.array([], field.type) for field in fields], []
    columns = _stored(columns)
    positions = outputs[POSITION].to_numpy()
    outputs = outputs.drop_columns([POSITION])

    def run(rows: np.ndarray) -> list[pa.Array]:
        index, chosen = pa.array(rows), pa.array(positions[rows])
        return task.postprocess(
            outputs.take(index), {name: array.take(chosen) for name, array in columns.items()}
        )

    results, failures = isolate(run, np.arange(len(outputs)))
    rejects = [reject(int(positions[row]), "postprocess", error) for row, error in failures]
    kept = np.concatenate([rows for rows, _ in results]) if results else np.empty(0, np.int64)
    arrays = [_join([arrays[k] for _, arrays in results], field.type) for k, field in enumerate(fields)]
    return positions[kept], arrays, rejects


def reject(position: int, stage: str, error: Exception) -> Reject:
    """Builds the reject of a row from its error."""
    return Reject(position, stage, type(error).__name__, redact_text(str(error) or repr(error)), cause=error)


def _stored(columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """Converts extension types to their storage types: tasks read a JSON column as text."""
    return {name: convert(array, storage_type(array.type)) for name, array in columns.items()}


def _without_nulls(
    columns: Mapping[str, pa.Array], rows: int, gone: Sequence[int]
) -> tuple[np.ndarray, list[Reject]]:
    """Returns positions of the rows that are neither gone nor null, and rejects of null rows."""
    usable = np.ones(rows, bool)
    usable[np.asarray(gone, np.int64)] = False
    rejects = []
    for name, array in columns.items():
        if array.null_count:
            null = pc.is_null(array).to_numpy(zero_copy_only=False)
            for position in np.flatnonzero(null & usable).tolist():
                rejects.append(Reject(position, "preprocess", "NullInput", f"{name} is null"))
            usable &= ~null
    return np.flatnonzero(usable), rejects


def _embedded(task: Task, features: pa.Table) -> tuple[pa.Table, list[Reject]]:
    """Removes rows with a token that has no embedding; returns the remaining features and the rejects.

    Such a token fails the whole batch, and on a GPU the whole process.
    """
    if "input_ids" not in features.column_names or not task.not_embedded:
        return features, []
    lists = flatten(features["input_ids"])
    ends = np.cumsum(list_lengths(lists))
    while pa.types.is_list(lists.type.value_type):
        lists = lists.flatten()
        ends = np.concatenate([[0], np.cumsum(list_lengths(lists))])[ends]
    tokens = lists.flatten().to_numpy()
    hits = np.flatnonzero(tokens >= task.embedded)
    rows, first = np.unique(np.searchsorted(ends, hits, side="right"), return_index=True)
    positions = features[POSITION].to_numpy()[rows]
    rejects = [
        Reject(position, "preprocess", "NoEmbedding", no_embedding(token, task.not_embedded, task.embedded))
        for position, token in zip(positions.tolist(), tokens[hits[first]].tolist(), strict=True)
    ]
    return features.take(pa.array(np.setdiff1d(np.arange(len(features)), rows))), rejects


def _join(arrays: list[pa.Array], kind: pa.DataType) -> pa.Array:
    flat = [array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array for array in arrays]
    joined = pa.concat_arrays(flat) if flat else pa.array([], kind)
    return joined if joined.type == kind else joined.cast(kind)
