"""The contract of input formats: how files of a format are opened, cut into pieces and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

READ_ERRORS = (OSError, ValueError, pa.ArrowException)
"""Exceptions of pyarrow and fsspec for a file that is absent, forbidden, truncated or not of its format."""
SPLIT_BYTES = 64 << 20
"""Most bytes of a split, uncompressed for Parquet; a larger row group or row is still one split."""
THREADS = 16
"""Files that are opened at the same time."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file in a listing."""

    path: str
    """Path relative to the listed folder."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Modification time; else a number that changes with the etag; 0 if neither is known."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rows of one input file."""

    file: str
    """Path relative to the input's root."""
    start: int
    stop: int
    """Row numbers in the file, stop excluded."""
    size: int
    mtime_ns: int
    """Size in bytes and modification time of the file, which detect a change."""
    bytes_range: tuple[int, int] | None = None
    """Byte range of the rows in a JSONL or CSV file."""


_NO_GROUPS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata of a file that planning uses."""

    schema: pa.Schema
    rows: np.ndarray = field(default_factory=lambda: _NO_GROUPS)
    """Rows of each row group, int64; empty for text files."""
    sizes: np.ndarray = field(default_factory=lambda: _NO_GROUPS)
    """Uncompressed bytes of each row group, int64."""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names by column."""


@dataclass
class Schemas:
    """What the files hold, found before their rows are read."""

    footers: dict[str, Footer] = field(default_factory=dict)
    """By file; for JSONL, the columns of all files under the name of one."""
    broken: dict[str, str] = field(default_factory=dict)
    """Files that cannot be read, and why."""
    notes: list[str] = field(default_factory=list)
    """Warnings, one sentence each."""


@dataclass(frozen=True)
class Types:
    """Types of columns that are known before rows are sampled."""

    given: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types in the spec; they take precedence."""
    kept: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types of an earlier run on the same output."""
    section: str = "input"
    """The section of the spec with the types, for messages."""

    @property
    def known(self) -> dict[str, pa.DataType]:
        """The types in the spec and of an earlier run."""
        return {**self.kept, **self.given}

    def without(self, names: Collection[str]) -> Types:
        """Returns the types of the other columns."""
        given, kept = ({n: k for n, k in of.items() if n not in names} for of in (self.given, self.kept))
        return Types(given, kept, self.section)


@dataclass(frozen=True)
class Wanted:
    """The columns to read from a file."""

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
    """A row that cannot be read, or from which a template cannot be rendered."""

    position: int
    """Position among the rows that were read together, from 0."""
    error: str
    """The kind of fault, in one word."""
    message: str
    line: str | None = None
    """The raw row, truncated to `lines.LINE_CHARACTERS`; bytes that are not UTF-8 are written as \\xff."""
    stage: str = "read"
    """The stage of its reject."""


@dataclass
class Parsed:
    """The rows parsed from some bytes."""

    table: pa.Table
    """All rows, including bad ones; values that cannot be read are null."""
    bad: list[BadRow] = field(default_factory=list)
    """Bad rows in order of their positions."""
    unplanned: dict[str, int] = field(default_factory=dict)
    """Other columns, with the number of rows in which they hold a value; only if `Wanted.whole` is set."""


class Format(ABC):
    """A format of input files. Holds no state: every worker makes its own from the format's name.

    Its methods raise READ_ERRORS for a file that cannot be read, which is then reported with its path.
    """

    title: ClassVar[str]
    """Its name in messages."""
    lines: ClassVar[bool]
    """Whether a row is written as a line of text, which the reject of a bad row then holds."""
    typed: ClassVar[bool]
    """Whether files hold the types of their columns; else types come from the spec or from a sample of the rows."""
    nested: ClassVar[bool]
    """Whether values may be lists and structs."""
    scans: ClassVar[bool]
    """Whether `cut` reads the whole file: then several files are cut at once, and none beyond a limit of rows."""

    @abstractmethod
    def schemas(self, fs: pafs.FileSystem, root: str, files: list[SourceFile], types: Types) -> Schemas:
        """Finds the columns of the files and their types.

        :param root: the folder of the files as a path on `fs`.
        :param types: types that are known; for formats that are not `typed`.
        """

    @abstractmethod
    def cut(
        self,
        fs: pafs.FileSystem,
        path: str,
        file: SourceFile,
        footer: Footer | None,
        split_rows: int,
        limit: int | None,
    ) -> tuple[list[Piece], int]:
        """Cuts a file into pieces of about SPLIT_BYTES, at least one, which may be empty.

        Parts are named by their pieces: a cut that changes makes every part stale.

        :param path: the file as a path on `fs`.
        :param footer: what `schemas` found of this file.
        :param split_rows: most rows in a piece.
        :param limit: number of rows after which to stop; only for formats that scan.
        :returns: the pieces, and the bytes of the file, by which small files are packed into a split.
        """

    @abstractmethod
    def read(self, fs: pafs.FileSystem, path: str, piece: Piece, wanted: Wanted, most: int) -> Parsed:
        """Reads the rows of a piece, with those that cannot be read as bad rows.

        :param wanted: columns to read; those that the file lacks may be left out of the table.
        :param most: most decoded bytes.
        :raises SplitError: if the file has other rows than the piece.
        """
