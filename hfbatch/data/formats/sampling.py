"""The sample of text files in which columns and types are found.

It is the first MiB of the first file with rows, and a few blocks spread evenly over all files.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

FIRST_BYTES = 1 << 20
BLOCK_BYTES = 64 << 10
BLOCKS = 15


@dataclass
class Inferred:
    """The columns inferred from some rows."""

    schema: pa.Schema
    rows: int
    bad: int = 0
    first: str = ""
    """The fault of the first bad row."""

    def note(self, reason: str) -> None:
        """Counts a row that cannot be read with these columns."""
        self.bad += 1
        self.first = self.first or reason


def bad_rows(sampled: list[tuple[str, Inferred]]) -> list[str]:
    """Returns a note on the rows of a sample that cannot be read, if there are any. :param sampled: by file."""
    bad = [(path, one) for path, one in sampled if one.bad]
    if not bad:
        return []
    rows, count = sum(one.rows for _, one in sampled), sum(one.bad for _, one in bad)
    return [
        f"{count:,} of {rows:,} sampled rows cannot be read and will be rejects; the first, in {bad[0][0]}: "
        f"{bad[0][1].first}"
    ]
