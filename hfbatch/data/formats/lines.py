"""Common parts of the JSONL and CSV parsers: line ends, and the texts of bad rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

BOM = b"\xef\xbb\xbf"
NEWLINE, QUOTE, RETURN, TAB, SPACE = 10, 34, 13, 9, 32
MOST_ROW_BYTES = 1 << 30
LINE_CHARACTERS = 10_000
"""Most characters of its line that a reject holds."""


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
