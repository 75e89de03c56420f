"""Checks in a sample of rows whether they name files that may be read. Opens none of the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hfbatch.data.reader import ReadPlan, read_split
from hfbatch.data.splits import Split
from hfbatch.errors import SplitError
from hfbatch.tasks.base import Task

SAMPLE_ROWS = 64


def named_files(
    task: Task, inputs: Mapping[str, str], splits: Sequence[Split], read: ReadPlan, most_rejected: float
) -> tuple[list[str], list[str]]:
    """Returns faults and notes about the files that the first rows name.

    It is a fault if more than half of these rows, and more than may be rejected, name a file that may not be read.

    :param inputs: task inputs mapped to dataset columns.
    :param most_rejected: largest share of rejected rows with which the job still succeeds.
    """
    columns = [inputs[column.name] for column in task.columns() if column.files and column.name in inputs]
    columns = [name for name in columns if name in read.columns]
    split = next((split for split in splits if split.rows and split.fault is None), None)
    if not columns or split is None:
        return [], []
    rows = _sample(split, read, columns)
    reasons = [task.files.refusal(name) for row in rows if (name := _refused(task, row)) is not None]
    if not reasons:
        return [], []
    summary = f"{len(reasons)} of the first {len(rows)} rows name files that may not be read: {reasons[0]}"
    if len(reasons) / len(rows) > max(0.5, most_rejected):
        return [summary], []
    return [], [f"{summary}; these rows will be rejects"]


def _sample(split: Split, read: ReadPlan, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the values of the columns in the first rows of a split; none if it cannot be read."""
    first = split.pieces[0]
    if first.bytes_range is None:  # a text file is read to the end of its range
        first = replace(first, stop=min(first.stop, first.start + SAMPLE_ROWS))
    names = tuple(name for name in read.columns if name in columns)
    schema = read.schema.empty_table().select(names).schema
    few = replace(read, columns=names, schema=schema, filter=None, rendered=None)
    try:
        return read_split(Split((first,)), few).table.slice(0, SAMPLE_ROWS).to_pylist()
    except SplitError:  # the job reports it
        return []


def _refused(task: Task, row: Mapping[str, Any]) -> str | None:
    """Returns the first file name in a row that may not be read."""
    return next(
        (name for value in row.values() for name in names_in(value) if task.files.refusal(name)), None
    )


def names_in(value: Any) -> Iterator[str]:
    """Yields the paths and URLs in a value: a name, a struct with a `path`, a part of a message, or a list of these."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from names_in(one)
    elif isinstance(value, dict):
        if "content" in value:
            yield from names_in(value["content"] if isinstance(value["content"], list) else None)
        elif "type" in value:
            shown = (value.get(key) for key in (value["type"], "path", "url") if value["type"] != "text")
            yield from names_in(next((one for one in shown if one), None))
        elif not value.get("bytes") and value.get("array") is None:
            yield from names_in(value.get("path"))
