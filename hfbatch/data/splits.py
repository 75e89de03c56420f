"""Splits: the units of work and of commit. They depend only on the input and the spec."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from hfbatch.data.formats.base import SPLIT_BYTES
from hfbatch.data.formats.base import Piece as Piece

SMALL_SHARE = 8
"""A file with fewer than split_rows / SMALL_SHARE rows shares a split with its neighbours."""
GROUP_EVERY = 16
"""On average, one in this many small files always starts a split."""


_SET_NAMES = re.compile(
    r"(?<![A-Za-z])(?:train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?![A-Za-z])"
)
"""The words by which `datasets` sorts files into sets of rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """Pieces that are read, processed and committed together."""

    pieces: tuple[Piece, ...]
    fault: str | None = None
    """Why the split cannot be read, if known at planning."""

    @property
    def rows(self) -> int:
        """Rows before the filter."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def where(self) -> str:
        """The half of the id for the position: files and row ranges."""
        return _digest([(p.file, p.start, p.stop) for p in self.pieces])

    @property
    def what(self) -> str:
        """The half of the id for the content: sizes and modification times."""
        return _digest([(p.size, p.mtime_ns) for p in self.pieces])

    @property
    def part(self) -> str:
        """Name of the part; sorted names are in input order within a folder."""
        first = self.pieces[0]
        stem = re.sub(r"[^A-Za-z0-9]+", "-", first.file.rsplit(".", 1)[0]).strip("-")[-60:]
        return part_name(f"part-{stem}-{first.start:010d}-{self.where}-{self.what}.parquet")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Split:
        """Creates a split from the result of `to_dict`."""
        return cls(tuple(Piece(**_tuples(piece)) for piece in values["pieces"]), values["fault"])


def part_name(name: str) -> str:
    """Capitalises `train`, `test` and the like in the name of a part.

    If some file names contain such a word, `datasets` reads these files alone.
    """
    return _SET_NAMES.sub(lambda found: found[0].capitalize(), name)


def where_of(part: str) -> str:
    """Returns the position half of a part's name."""
    return part.rsplit("-", 2)[1]


def _tuples(piece: dict[str, Any]) -> dict[str, Any]:
    span = piece["bytes_range"]
    return {**piece, "bytes_range": tuple(span) if span else None}


def _digest(values: object) -> str:
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def group_pieces(files: Iterable[tuple[list[Piece], int]], split_rows: int) -> Iterator[Split]:
    """Groups the pieces of files into splits: one split per piece, but small files of one folder share a split.

    A file whose path hashes to 0 mod GROUP_EVERY always starts a split. So an added or removed file changes the
    splits only up to the next such file, and all other parts stay valid.

    :param files: the pieces and the bytes of each file, in order.
    """
    run: list[Piece] = []
    rows = held = 0
    for pieces, size in files:
        first = pieces[0]
        count = first.stop - first.start
        small = len(pieces) == 1 and count * SMALL_SHARE < split_rows and size < SPLIT_BYTES
        joins = (
            small
            and bool(run)
            and _folder(run[-1].file) == _folder(first.file)
            and rows + count <= split_rows
            and held + size <= SPLIT_BYTES
            and zlib.crc32(first.file.encode()) % GROUP_EVERY != 0
        )
        if run and not joins:
            yield Split(tuple(run))
            run, rows, held = [], 0, 0
        if small:
            run.append(first)
            rows, held = rows + count, held + size
        else:
            yield from (Split((piece,)) for piece in pieces)
    if run:
        yield Split(tuple(run))


def first_rows(splits: Iterable[Split], limit: int) -> list[Split]:
    """Returns the splits up to a number of rows; the last one is shortened to fit."""
    kept: list[Split] = []
    left = limit
    for split in splits:
        if left <= 0:
            break
        if split.rows <= left:
            kept.append(split)
            left -= split.rows
            continue
        pieces = []
        for piece in split.pieces:
            if left > 0:
                pieces.append(replace(piece, stop=min(piece.stop, piece.start + left)))
                left -= pieces[-1].stop - piece.start
        kept.append(replace(split, pieces=tuple(pieces)))
        left = 0
    return kept


def _folder(file: str) -> str:
    return file.rpartition("/")[0]
