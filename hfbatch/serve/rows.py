"""Rows of requests: checks them, and turns their values into columns. Does not import Ray or torch."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa

from hfbatch.data.download import FileRefusedError
from hfbatch.data.rendering import RenderedColumn, render_column
from hfbatch.errors import SpecError
from hfbatch.output.rejects import Reject
from hfbatch.predict.prompts import rendered_input, replaced
from hfbatch.tasks.base import InputColumn, Task

NO_FILE = "requests cannot name this file; send its bytes as a `data:` URL"
MOST_FAULTS = 5
"""Faults of a request that are reported."""
Kinds = tuple[tuple[str, pa.DataType], ...]
"""Task inputs with their Arrow types."""


class RequestError(Exception):
    """A request that cannot be answered. :param faults: one sentence for each. :param status: of HTTP."""

    def __init__(self, faults: Sequence[str] | str, status: int = 400) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        self.status = status
        super().__init__("; ".join(self.faults))


@dataclass(frozen=True)
class Row:
    """A row of a request."""

    values: Mapping[str, Any]
    """Task input to value; inputs that are missing are null."""
    kinds: Kinds
    """Rows of the same kinds run together."""
    params: str = "{}"
    """Params of the request in place of the spec's, as JSON; rows of the same params run together."""
    source: str = ""
    """With `number` what the noise of sampling depends on: the same for a request that is repeated with its seed."""
    number: int = 0


@dataclass(frozen=True)
class Answer:
    """What became of a row."""

    columns: Mapping[str, pa.Array]
    """Output columns of the rows that ran together."""
    index: int
    """The row's position in them; -1 if it was rejected."""
    tokens: int
    """Tokens of the row that the model has read."""
    reject: Reject | None = None

    def value(self, name: str) -> Any:
        """The value of an output column."""
        return self.columns[name][self.index].as_py()

    def vector(self, name: str) -> np.ndarray:
        """The value of a column of lists of floats, as float32."""
        return np.asarray(self.columns[name][self.index].values, np.float32)

    def to_values(self) -> dict[str, Any] | None:
        """All output columns, as JSON can hold them; None for a rejected row."""
        if self.reject is not None:
            return None
        return {name: plain(self.value(name)) for name in self.columns}

    def reason(self) -> dict[str, Any] | None:
        """Stage, type and message of a reject; None for other rows."""
        if self.reject is None:
            return None
        refused = self.reject.error == FileRefusedError.__name__  # its message names folders of this machine
        message = NO_FILE if refused else self.reject.message
        return {"stage": self.reject.stage, "error": self.reject.error, "message": message}


@dataclass(frozen=True)
class RowReader:
    """What rows of requests hold: the inputs of the task, and in place of one that a template renders, its columns."""

    task: Task
    rendered: RenderedColumn | None = None
    """What `params.template` or `params.messages` renders."""
    renders: str = ""
    """The input that it renders."""

    @classmethod
    def of(cls, task: Task) -> Self:
        """The reader of a task's rows. :raises SpecError: with every fault of its templates."""
        faults: list[str] = []
        found = rendered_input(task, faults)
        if faults:
            raise SpecError(faults)
        return cls(task, found[2], found[1].name) if found else cls(task)

    @cached_property
    def inputs(self) -> dict[str, InputColumn | None]:
        """What rows may have: inputs of the task, and columns of a template, of any type."""
        columns = {column.name: column for column in self.task.columns()}
        if self.rendered is None:
            return dict(columns)
        gone = replaced(columns[self.renders], self.task)
        kept = {name: column for name, column in columns.items() if name not in gone}
        return {**dict.fromkeys(sorted(self.rendered.columns)), **kept}

    def read(self, rows: Sequence[Any], params: str = "{}", source: str = "") -> list[Row]:
        """Checks the rows of a request.

        :raises RequestError: with the first faults: keys that the task does not read, inputs that are missing, values
            of other types. A single value that cannot be used becomes a reject later.
        """
        if faults := [
            f"rows[{k}] is not an object; write rows as {{{', '.join(self.inputs)}}}"
            for k, row in enumerate(rows)
            if not isinstance(row, dict)
        ]:
            raise RequestError(faults[:MOST_FAULTS], 422)
        present = dict.fromkeys(name for row in rows for name in row)
        faults, kinds = self._faults_of_names(present), []
        for name, column in self.inputs.items():
            if name not in present:
                continue
            try:
                kind = _kind([row.get(name) for row in rows])
            except (pa.ArrowException, ArithmeticError, TypeError, ValueError) as error:
                faults.append(f"values of {name!r} have no common type: {str(error).splitlines()[0]}")
                continue
            if column and not pa.types.is_null(kind) and not column.accepts(kind):
                faults.append(f"{name!r} is {kind}; task {self.task.name} takes {column.wants}")
            kinds.append((name, kind))
        given = {name for name, _ in kinds if self.inputs[name]} | (
            {self.renders} if self.rendered else set()
        )
        faults += self.task.column_faults(given) if not faults else []
        if faults:
            raise RequestError(faults[:MOST_FAULTS], 422)
        return [Row(row, tuple(kinds), params, source, number) for number, row in enumerate(rows)]

    def _faults_of_names(self, present: Collection[str]) -> list[str]:
        reads = ", ".join(self.inputs)
        faults = [
            f"rows have {name!r}, which task {self.task.name} does not read; it reads {reads}"
            for name in present
            if name not in self.inputs
        ]
        return faults + [
            f"no row has {name!r} ({column.wants if column else 'a column of the template'})"
            for name, column in self.inputs.items()
            if name not in present and (column is None or column.required)
        ]

    def columns_of(self, rows: Sequence[Row]) -> tuple[dict[str, pa.Array], list[Reject]]:
        """The task's input columns of rows of the same kinds, and the rows on which a template fails."""
        table = {name: pa.array([row.values.get(name) for row in rows], kind) for name, kind in rows[0].kinds}
        if self.rendered is None:
            return table, []
        made, bad = render_column(self.rendered, pa.table(table), ())
        inputs = {name: array for name, array in table.items() if self.inputs[name] is not None}
        rejects = [Reject(row.position, row.stage, row.error, row.message) for row in bad]
        return {**inputs, self.renders: made}, rejects


def _kind(values: list[Any]) -> pa.DataType:
    """The Arrow type of JSON values."""
    if all(isinstance(value, str) for value in values):
        return pa.string()
    return pa.array(values).type


def to_places(rows: Sequence[Row]) -> pa.Table:
    """`file` and `row` of each row, as `Task.preprocess` takes them."""
    sources, numbers = [row.source for row in rows], [row.number for row in rows]
    return pa.table({"file": pa.array(sources, pa.string()), "row": pa.array(numbers, pa.int64())})


def plain(value: Any) -> Any:
    """A value as JSON can hold it: bytes as base64, times as ISO texts."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return value if not value or isinstance(value[0], float | int | str) else [plain(v) for v in value]
    return value
