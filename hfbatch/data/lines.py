"""What JSONL and CSV share: where lines end, what to read of a file, and rows that cannot be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

BOM = b"\xef\xbb\xbf"
NEWLINE, QUOTE, RETURN, TAB, SPACE = 10, 34, 13, 9, 32
MOST_ROW_BYTES = 1 << 30
LINE_CHARACTERS = 10_000
"""Characters of its line that a reject holds."""


@dataclass(frozen=True)
class Wanted:
    """What to read of a text file."""

    schema: pa.Schema
    """The columns and their types."""
    given: frozenset[str] = frozenset()
    """Columns whose type the spec gives: their values are converted; others have to fit as they are written."""
    whole: bool = False
    """Whether other columns that rows hold are to be told."""
    section: str = "input"
    """The part of the spec that asks for it, to name in messages."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read."""

    position: int
    """Among the rows that were read together, from 0."""
    error: str
    """What kind of fault, in a word."""
    message: str
    line: str | None = None
    """The row as the file has it, cut to LINE_CHARACTERS; bytes that are not UTF-8 are written as \\xff."""


@dataclass
class Parsed:
    """The rows of some bytes."""

    table: pa.Table
    """All rows, bad ones too; a value that cannot be read is null."""
    bad: list[BadRow] = field(default_factory=list)
    """In order of their positions."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Columns that were not asked for, and in how many rows they hold a value; told where Wanted.whole is set."""


def newlines(view: np.ndarray) -> np.ndarray:
    """Positions of the line feeds in uint8 bytes, int64."""
    return np.flatnonzero(view == NEWLINE)


def shown(line: bytes) -> str:
    """A row as a reject holds it."""
    text = line[: 4 * LINE_CHARACTERS].decode("utf8", "backslashreplace").rstrip("\r\n")
    return text if len(text) <= LINE_CHARACTERS else text[: LINE_CHARACTERS - 1] + "…"


def misfit(name: str, kind: pa.DataType, value: str, section: str) -> str:
    """The sentence for a value that is not of its column's type."""
    short = value if len(value) <= 60 else value[:59] + "…"
    return (
        f"column {name!r} is {kind}, but the row has {short}; mend the row, or give the type in {section}.types, "
        f"such as {section}.types: {{{name}: string}}"
    )


def with_nulls(table: pa.Table, kept: np.ndarray, count: int) -> pa.Table:
    """A table of `count` rows, null but for those at the positions `kept`, which are the table's own in order."""
    index = np.full(count, -1, np.int64)
    index[kept] = np.arange(len(kept))
    return table.take(pa.array(index, mask=index < 0))


def refuse_repeated(names: list[str]) -> None:
    """:raises ValueError: where two columns have one name, so that one of them would be lost."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"it has more than one column named {twice[0]!r}")


def refuse_utf16(data: bytes) -> None:
    """:raises ValueError: where a file begins as UTF-16 does, which has zero bytes all over."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is UTF-16; save it as UTF-8")
