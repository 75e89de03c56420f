"""Opens an input: its files, format and schema, and its splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from hfbatch.data.filesystem import Location, absolute
from hfbatch.data.formats import FORMATS
from hfbatch.data.formats.base import READ_ERRORS, THREADS, Footer, Format, Piece, SourceFile, Types
from hfbatch.data.formats.columns import common_type, plain_type
from hfbatch.data.formats.texttypes import KNOWN, name_of, type_of
from hfbatch.data.listing import choose_format, describe_left_out, find_files, partition_keys, partition_types
from hfbatch.data.splits import Split, first_rows, group_pieces
from hfbatch.errors import SpecError, one_line
from hfbatch.spec.job import InputSpec


@dataclass
class Source:
    """A listed input with a known schema."""

    path: Location
    """The path of the spec, made absolute."""
    root_url: Location
    """The folder of the relative file names, as a URL or absolute path."""
    fs: pafs.FileSystem
    root: str
    """The same folder as a path on `fs`."""
    files: list[SourceFile]
    """Sorted by path."""
    format: str
    """Its name in FORMATS."""
    schema: pa.Schema
    """The columns of all files, partition columns last, with types by `columns.plain_type` and `common_type`."""
    hive: dict[str, pa.DataType]
    """Columns from `key=value` folders."""
    broken: dict[str, str]
    """Files that cannot be read, and why."""
    footers: dict[str, Footer] = field(default_factory=dict, repr=False)
    conflicts: dict[str, str] = field(default_factory=dict)
    """Columns whose types in the files have no common type, or that occur twice: one sentence each."""
    left_out: list[str] = field(default_factory=list)
    """Paths that are not read: one line per reason."""
    given: frozenset[str] = frozenset()
    """Columns whose type the spec gives."""
    notes: list[str] = field(default_factory=list)
    """Warnings about rows and types, one sentence each."""

    def faults_of(self, columns: Iterable[str]) -> list[str]:
        """Returns the faults of the columns that are read; those of other columns do not matter."""
        wanted = set(columns)
        return [fault for name, fault in self.conflicts.items() if name in wanted]

    @property
    def types(self) -> dict[str, Any]:
        """Types that a later run keeps, as plain values: those of text files' columns and of partitions."""
        names = self.hive if FORMATS[self.format].load().typed else self.schema.names
        return {name: name_of(self.schema.field(name).type) for name in names}

    def classes_of(self, column: str) -> tuple[str, ...] | None:
        """Returns the class names of a column in the files, by class number; None if there are none.

        :raises SpecError: if files have different class names.
        """
        named = {
            path: footer.classes[column] for path, footer in self.footers.items() if column in footer.classes
        }
        first = next(iter(named), "")
        for path, names in named.items():
            if names != named[first]:
                raise SpecError(
                    f"column {column!r} has other class names in {path} than in {first}; rewrite one of the files, "
                    "or name the classes in params"
                )
        return named.get(first)

    def files_without(self, column: str) -> list[str]:
        """Returns files that lack a column, which is null there; JSONL columns are known only after reading."""
        if column in self.hive:
            return [file.path for file in self.files if column not in partition_keys(file.path)]
        return [path for path, footer in self.footers.items() if column not in footer.schema.names]

    def cut(self, split_rows: int, limit: int | None = None) -> list[Split]:
        """Cuts the input into splits, in input order; a broken file becomes a split without rows, with its fault.

        :param limit: number of first rows, in order of files; Parquet splits are the same as without a limit,
            except the last.
        """
        file_format = FORMATS[self.format].load()
        cut = partial(self._pieces, file_format, split_rows)
        if not file_format.scans:
            pieces: Iterator[tuple[list[Piece], int]] = map(cut, self.files)
        elif limit is None:
            with ThreadPoolExecutor(THREADS) as pool:
                pieces = iter(list(pool.map(cut, self.files)))
        else:
            pieces = self._pieces_until(cut, limit)
        splits = [self._with_fault(split) for split in self._grouped(pieces, split_rows)]
        return splits if limit is None else first_rows(splits, limit)

    def _grouped(self, pieces: Iterator[tuple[list[Piece], int]], split_rows: int) -> Iterator[Split]:
        """Groups pieces file by file; broken files become separate splits."""
        healthy: list[tuple[list[Piece], int]] = []
        for item in pieces:
            if item[0][0].file in self.broken:
                yield from group_pieces(healthy, split_rows)
                yield Split(tuple(item[0]))
                healthy = []
            else:
                healthy.append(item)
        yield from group_pieces(healthy, split_rows)

    def _with_fault(self, split: Split) -> Split:
        reason = self.broken.get(split.pieces[0].file)
        return (
            split
            if reason is None
            else Split(split.pieces, f"{split.pieces[0].file} cannot be read: {reason}")
        )

    def _pieces(
        self, file_format: Format, split_rows: int, file: SourceFile, limit: int | None = None
    ) -> tuple[list[Piece], int]:
        """Returns the pieces of a file and its bytes; for a broken file, one without rows."""
        if file.path not in self.broken:
            path, footer = f"{self.root}/{file.path}", self.footers.get(file.path)
            try:
                return file_format.cut(self.fs, path, file, footer, split_rows, limit)
            except READ_ERRORS as error:
                self.broken[file.path] = one_line(error)
        return [Piece(file.path, 0, 0, file.size, file.mtime_ns)], 0

    def _pieces_until(
        self, cut: Callable[..., tuple[list[Piece], int]], limit: int
    ) -> Iterator[tuple[list[Piece], int]]:
        """Scans one file after the other, since a scan reads the file; files beyond the limit are not read."""
        for file in self.files:
            if limit <= 0:
                return
            pieces, size = cut(file, limit)
            yield pieces, size
            limit -= sum(piece.stop - piece.start for piece in pieces)


def open_source(spec: InputSpec, kept: Mapping[str, Any] | None = None) -> Source:
    """Lists the input and finds its schema, from Parquet footers or a sample of text.

    :param kept: the types of an earlier run, from `Source.types`.
    :raises SpecError: if there is nothing to read or the format is unknown. Conflicting types of a column are an
        error only if the column is read: see `Source.faults_of`.
    """
    types = Types(_types_given(spec), {name: type_of(value) for name, value in (kept or {}).items()})
    found = find_files(spec.path)
    listing = found.listing
    name, files = choose_format(spec, found)
    file_format = FORMATS[name].load()
    unreadable = {
        file.path: listing.unreadable[file.path] for file in files if file.path in listing.unreadable
    }
    readable = [file for file in files if file.path not in unreadable]
    notes: list[str] = []
    hive = partition_types(readable, types.known, notes)
    footers: dict[str, Footer] = {}
    broken = unreadable
    if readable:
        made = file_format.schemas(found.fs, found.root, readable, types.without(hive))
        footers, broken = made.footers, broken | made.broken
        notes += made.notes
    if not footers:
        first, reason = next(iter(broken.items()))
        raise SpecError(f"none of the {len(files)} input files can be read; {first}: {reason}")
    union = _unite(footers)
    columns = [(name, kind) for name, kind in union.types.items() if name not in hive]
    conflicts = {name: fault for name, fault in union.conflicts.items() if name not in hive}
    schema = pa.schema([*columns, *hive.items()])
    _check_given(spec, file_format, schema, hive)
    return Source(
        absolute(spec.path), found.root_url, found.fs, found.root, files, name, schema, hive, broken, footers,
        conflicts, describe_left_out(listing.left_out), frozenset(spec.types), notes,
    )  # fmt: skip


def _types_given(spec: InputSpec) -> dict[str, pa.DataType]:
    """Parses the types in the spec. :raises SpecError: with all invalid types."""
    found, faults = {}, []
    for name, value in spec.types.items():
        try:
            found[name] = type_of(value)
        except ValueError:
            faults.append(f"input.types: {value!r} of column {name!r} is not a type; use one of: {KNOWN}")
    if faults:
        raise SpecError(faults)
    return found


def _check_given(
    spec: InputSpec, file_format: Format, schema: pa.Schema, hive: dict[str, pa.DataType]
) -> None:
    """:raises SpecError: for columns that cannot have the type given in the spec."""
    faults = []
    for name in spec.types:
        if name not in schema.names:
            faults.append(f"input.types: column {name!r} not in input (has: {', '.join(schema.names)})")
        elif name not in hive and file_format.typed:
            untyped = [one.title for one in (kind.load() for kind in FORMATS.values()) if not one.typed]
            faults.append(
                f"input.types: column {name!r} has its type in the {file_format.title} files; types can be given "
                f"only for {', '.join(untyped)} and key=value folders"
            )
        elif pa.types.is_nested(schema.field(name).type) and (not file_format.nested or name in hive):
            faults.append(
                f"input.types: column {name!r} cannot be {schema.field(name).type}, since its values are plain texts; use string"
            )
    if faults:
        raise SpecError(faults)


@dataclass
class _Union:
    """The common columns of all files."""

    types: dict[str, pa.DataType] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    """The file from which a column's type comes."""
    conflicts: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, schema: pa.Schema) -> None:
        """Adds the columns of a file."""
        for name, count in Counter(schema.names).items():
            kind = plain_type(schema.types[schema.names.index(name)])
            before = self.types.setdefault(name, kind)
            first = self.origin.setdefault(name, path)
            both = common_type(before, kind)
            if count > 1:
                self.conflicts.setdefault(
                    name, f"{path} has more than one column named {name!r}; rename one of them"
                )
            elif both is None:
                self.conflicts.setdefault(
                    name,
                    f"column {name!r} is {before} in {first} but {kind} in {path}, and no type holds the values of "
                    "both exactly; rewrite one of the files, or choose files with a glob in input.path",
                )
            elif not both.equals(before):
                self.types[name], self.origin[name] = both, path


def _unite(footers: dict[str, Footer]) -> _Union:
    """Finds the common type of each column of the files, and the conflicts."""
    union = _Union()
    seen: list[pa.Schema] = []
    for path, footer in footers.items():
        if not any(footer.schema.equals(other) for other in seen):
            seen.append(footer.schema)
            union.add(path, footer.schema)
    return union
