"""Common parts of the JSONL and CSV parsers: line ends, the columns to read, and bad rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

BOM = b"\xef\xbb\xbf"
NEWLINE, QUOTE, RETURN, TAB, SPACE = 10, 34, 13, 9, 32
MOST_ROW_BYTES = 1 << 30
LINE_CHARACTERS = 10_000
"""Most characters of its line that a reject holds."""


@dataclass(frozen=True)
class Wanted:
    """The columns to read from a text file."""

    schema: pa.Schema
    """The columns and their types."""
    given: frozenset[str] = frozenset()
    """Columns whose type the spec gives: their values are converted; those of others have to fit as written."""
    whole: bool = False
    """Whether to report other columns in the rows."""
    section: str = "input"
    """The section of the spec with the file, for messages."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    position: int
    """Position among the rows that were read together, from 0."""
    error: str
    """The kind of fault, in one word."""
    message: str
    line: str | None = None
    """The raw row, truncated to LINE_CHARACTERS; bytes that are not UTF-8 are written as \\xff."""


@dataclass
class Parsed:
    """The rows parsed from some bytes."""

    table: pa.Table
    """All rows, including bad ones; values that cannot be read are null."""
    bad: list[BadRow] = field(default_factory=list)
    """Bad rows in order of their positions."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Other columns, with the number of rows in which they hold a value; only if `Wanted.whole` is set."""


def newlines(view: np.ndarray) -> np.ndarray:
    """Returns the positions of the line feeds in uint8 bytes, int64."""
    return np.flatnonzero(view == NEWLINE)


def shown(line: bytes) -> str:
    """Formats a raw row for a reject."""
    text = line[: 4 * LINE_CHARACTERS].decode("utf8", "backslashreplace").rstrip("\r\n")
    return text if len(text) <= LINE_CHARACTERS else text[: LINE_CHARACTERS - 1] + "…"


def misfit(name: str, kind: pa.DataType, value: str, section: str) -> str:
    """Returns the message for a value that does not fit its column's type."""
    short = value if len(value) <= 60 else value[:59] + "…"
    return (
        f"column {name!r} is {kind}, but the row has {short}; fix the row, or give the type in {section}.types, "
        f"such as {section}.types: {{{name}: string}}"
    )


def with_nulls(table: pa.Table, kept: np.ndarray, count: int) -> pa.Table:
    """Returns a table of `count` rows: the given rows at the positions `kept`, and nulls elsewhere."""
    index = np.full(count, -1, np.int64)
    index[kept] = np.arange(len(kept))
    return table.take(pa.array(index, mask=index < 0))


def refuse_repeated(names: list[str]) -> None:
    """:raises ValueError: if two columns have the same name, so that one of them would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"it has more than one column named {twice[0]!r}")


def refuse_utf16(data: bytes) -> None:
    """:raises ValueError: if a file begins with the byte order mark of UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is UTF-16; save it as UTF-8")
