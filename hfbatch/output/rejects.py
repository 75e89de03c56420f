"""Rejects: rows that could not be processed, with the reason. Writes no files."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from hfbatch.data.formats.columns import convert
from hfbatch.data.reader import Rows
from hfbatch.errors import redact_text

MESSAGE_CHARACTERS = 500
_REASON = pa.schema(
    [
        ("hfbatch_file", pa.string()),
        ("hfbatch_row", pa.int64()),
        ("hfbatch_stage", pa.string()),
        ("hfbatch_error", pa.string()),
        ("hfbatch_message", pa.string()),
    ]
)
_LINE = pa.field("hfbatch_line", pa.string())
"""The line of a text file if the row could not be read; else null."""


@dataclass
class Reject:
    """A rejected row and the reason."""

    position: int
    """The row's position in its split, after the filter."""
    stage: str
    """read, preprocess, forward or postprocess."""
    error: str
    """Type of the exception, or a word such as `null`."""
    message: str
    line: str | None = None
    """The line of the file if the row could not be read."""
    traceback: str = ""
    """Where the exception was raised, as text; of each kind in a split, the first reject alone keeps it."""
    cause: BaseException | None = field(default=None, repr=False, compare=False)
    """The exception, in the process that raised it."""

    @property
    def reason(self) -> str:
        """Stage and type of the exception."""
        return f"{self.stage}: {self.error}"

    def trace(self) -> str:
        """Returns where the exception was raised; empty if there was none. Formatting takes longer than many rows do."""
        return self.traceback or (format_trace(self.cause) if self.cause else "")


def format_trace(error: BaseException) -> str:
    """Returns the traceback of an exception and its causes, without secrets of URLs."""
    return redact_text("".join(traceback.format_exception(error)))


def first_traces(rejects: Iterable[Reject]) -> dict[str, str]:
    """Returns the first traceback of each kind of reject; formats no others."""
    found: dict[str, str] = {}
    for one in rejects:
        if one.reason not in found and (trace := one.trace()):
            found[one.reason] = trace
    return found


def dump_rejects(rejects: Sequence[Reject]) -> str:
    """Serialises rejects as JSON, with the first traceback of each kind."""
    traces, values = first_traces(rejects), []
    for one in rejects:
        plain = {name: getattr(one, name) for name in _PLAIN}
        raised = bool(one.traceback or one.cause)
        values.append({**plain, "traceback": traces.pop(one.reason, "") if raised else ""})
    return json.dumps(values)


def load_rejects(text: str) -> list[Reject]:
    """Reads the result of `dump_rejects`."""
    return [Reject(**values) for values in json.loads(text)]


_PLAIN = ("position", "stage", "error", "message", "line")


def unreadable(rows: Rows) -> list[Reject]:
    """Returns the rejects of the rows that could not be read or rendered."""
    return [Reject(bad.position, bad.stage, bad.error, bad.message, bad.line) for bad in rows.bad]


def reject_schema(input_schema: pa.Schema, lines: bool = False) -> pa.Schema:
    """Returns the schema of rejects: the input's columns, then source file, row number, stage, error type and message.

    :param lines: whether to add a column for lines of JSONL and CSV that could not be read.
    """
    about = [*_REASON, *([_LINE] if lines else [])]
    columns = [column for column in input_schema if column.name not in [field.name for field in about]]
    return pa.schema([*columns, *about])


def rejects_table(rows: Rows, rejects: Sequence[Reject], schema: pa.Schema) -> pa.Table:
    """Returns the rejected rows in input order with their reasons; columns that were not read are null.

    :param schema: the result of `reject_schema`.
    """
    ordered = sorted(rejects, key=lambda reject: reject.position)
    positions = np.array([reject.position for reject in ordered], np.int64)
    table, places = rows.table.take(positions), rows.places.take(positions)
    reasons = {
        "hfbatch_file": places["file"],
        "hfbatch_row": places["row"],
        "hfbatch_stage": pa.array([reject.stage for reject in ordered], pa.string()),
        "hfbatch_error": pa.array([reject.error for reject in ordered], pa.string()),
        "hfbatch_message": pa.array([_short(reject.message) for reject in ordered], pa.string()),
        "hfbatch_line": pa.array([reject.line for reject in ordered], pa.string()),
    }
    columns = []
    for column in schema:
        if column.name in reasons:
            columns.append(reasons[column.name])
        elif column.name in table.column_names:
            columns.append(convert(table[column.name], column.type))
        else:
            columns.append(pa.nulls(len(ordered), column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _short(message: str) -> str:
    # A message may quote text with lone surrogates, which Arrow cannot hold.
    clean = message.encode("utf8", "replace").decode("utf8")
    return clean if len(clean) <= MESSAGE_CHARACTERS else clean[: MESSAGE_CHARACTERS - 1] + "…"
