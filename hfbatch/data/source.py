"""The input as a whole: files, format and schema, and how it is cut. Knows nothing of tasks and outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hfbatch.data import textfiles
from hfbatch.data.filesystem import READ_ERRORS, SourceFile, absolute, one_line
from hfbatch.data.lines import refuse_repeated
from hfbatch.data.listing import choose_format, find_files, partition_keys, partition_types
from hfbatch.data.splits import SPLIT_BYTES, Piece, Split, cut_groups, first_rows, pack
from hfbatch.data.textschema import TextSchemas, Types, csv_schemas, jsonl_schemas
from hfbatch.data.texttypes import KNOWN, name_of, type_of
from hfbatch.errors import SpecError
from hfbatch.spec import InputSpec

THREADS = 16


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning keeps of a file's own metadata."""

    schema: pa.Schema
    rows: np.ndarray
    """Rows of each row group, int64; empty for text files."""
    sizes: np.ndarray
    """Uncompressed bytes of each row group, int64."""
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of numbered classes, by column."""


@dataclass
class Source:
    """An input that was listed and whose schema is known."""

    path: str
    """What the spec names, made absolute."""
    root_url: str
    """The folder that file names are relative to, as a URL or absolute path."""
    fs: pafs.FileSystem
    root: str
    """The same folder as a path on fs."""
    files: list[SourceFile]
    """Sorted by path."""
    format: str
    schema: pa.Schema
    """The columns of all files together, partition columns last."""
    hive: dict[str, pa.DataType]
    """Columns that come from `key=value` folders."""
    broken: dict[str, str]
    """Files that cannot be read, and why."""
    footers: dict[str, Footer] = field(default_factory=dict, repr=False)
    given: frozenset[str] = frozenset()
    """Columns whose type the spec gives."""
    notes: list[str] = field(default_factory=list)
    """What to mind about rows and types, one sentence each."""

    @property
    def types(self) -> dict[str, Any]:
        """Types that a later run keeps to, in plain values: of text files' columns and of partitions."""
        names = self.hive if self.format == "parquet" else self.schema.names
        return {name: name_of(self.schema.field(name).type) for name in names}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def classes_of(self, column: str) -> tuple[str, ...] | None:
        """Names that the files give to a column's numbers, 0 first; None without any.

        :raises SpecError: when files give them different names.
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
        """Files that lack a column, so that it is null there; a JSONL file's columns show only in reading."""
        if column in self.hive:
            return [file.path for file in self.files if column not in partition_keys(file.path)]
        return [path for path, footer in self.footers.items() if column not in footer.schema.names]

    def cut(self, split_rows: int, limit: int | None = None) -> list[Split]:
        """All splits in input order; a broken file is one of no rows, with its fault.

        :param limit: only the first rows, in order of files; Parquet splits are the same as without a limit,
            but for the last.
        """
        if self.format == "parquet":
            pieces: Iterator[tuple[list[Piece], int]] = map(self._parquet_pieces(split_rows), self.files)
        elif limit is None:
            with ThreadPoolExecutor(THREADS) as pool:
                pieces = iter(list(pool.map(lambda file: self._text_pieces(file, split_rows), self.files)))
        else:
            pieces = self._text_pieces_until(split_rows, limit)
        splits = [self._with_fault(split) for split in self._packed(pieces, split_rows)]
        return splits if limit is None else first_rows(splits, limit)

    def _packed(self, pieces: Iterator[tuple[list[Piece], int]], split_rows: int) -> Iterator[Split]:
        """Packs file by file, with broken files between as splits of their own."""
        healthy: list[tuple[list[Piece], int]] = []
        for item in pieces:
            if item[0][0].file in self.broken:
                yield from pack(healthy, split_rows)
                yield Split(tuple(item[0]))
                healthy = []
            else:
                healthy.append(item)
        yield from pack(healthy, split_rows)

    def _with_fault(self, split: Split) -> Split:
        reason = self.broken.get(split.pieces[0].file)
        return (
            split
            if reason is None
            else Split(split.pieces, f"{split.pieces[0].file} cannot be read: {reason}")
        )

    def _parquet_pieces(self, split_rows: int) -> Callable[[SourceFile], tuple[list[Piece], int]]:
        def pieces(file: SourceFile) -> tuple[list[Piece], int]:
            if file.path in self.broken:
                return [Piece(file.path, 0, 0, file.size, file.mtime_ns)], 0
            footer = self.footers[file.path]
            ranges = cut_groups(footer.rows.tolist(), footer.sizes.tolist(), split_rows)
            cuts = [Piece(file.path, start, stop, file.size, file.mtime_ns) for start, stop, _ in ranges]
            return cuts, sum(size for _, _, size in ranges)

        return pieces

    def _text_pieces(
        self, file: SourceFile, split_rows: int, limit: int | None = None
    ) -> tuple[list[Piece], int]:
        if file.path not in self.broken:
            path = f"{self.root}/{file.path}"
            try:
                runs = textfiles.scan(self.fs, path, self.format, split_rows, SPLIT_BYTES, limit)
                return [
                    Piece(file.path, r.start, r.stop, file.size, file.mtime_ns, (r.first_byte, r.end_byte))
                    for r in runs
                ], file.size
            except READ_ERRORS as error:
                self.broken[file.path] = one_line(error)
        return [Piece(file.path, 0, 0, file.size, file.mtime_ns)], 0

    def _text_pieces_until(self, split_rows: int, limit: int) -> Iterator[tuple[list[Piece], int]]:
        """One file after the other, since a scan reads the file: those beyond the limit stay unread."""
        for file in self.files:
            if limit <= 0:
                return
            pieces, size = self._text_pieces(file, split_rows, limit)
            yield pieces, size
            limit -= sum(piece.stop - piece.start for piece in pieces)


def open_source(spec: InputSpec, kept: Mapping[str, Any] | None = None) -> Source:
    """Lists the input and reads what tells its schema: Parquet footers, or a sample of text.

    :param kept: the types of an earlier run, as `Source.types` gave them.
    :raises SpecError: when there is nothing to read, the format is unknown or files contradict each other.
    """
    types = Types(_types_given(spec), {name: type_of(value) for name, value in (kept or {}).items()})
    root_url, fs, root, files = find_files(spec.path)
    file_format, files = choose_format(spec, files)
    notes: list[str] = []
    hive = partition_types(files, types.known, notes)
    footers, broken = _read_footers(fs, root, files, file_format, types.without(hive), notes)
    if not footers:
        first, reason = next(iter(broken.items()))
        raise SpecError(f"none of the {len(files)} input files can be read; {first}: {reason}")
    schema = _unify(footers, hive)
    _check_given(spec, file_format, schema, hive)
    return Source(
        absolute(spec.path), root_url, fs, root, files, file_format, schema, hive, broken, footers,
        frozenset(spec.types), notes,
    )  # fmt: skip


def _types_given(spec: InputSpec) -> dict[str, pa.DataType]:
    """The types that the spec gives. :raises SpecError: with all that are none."""
    found, faults = {}, []
    for name, value in spec.types.items():
        try:
            found[name] = type_of(value)
        except ValueError:
            faults.append(f"input.types: {value!r} of column {name!r} is no type; use one of: {KNOWN}")
    if faults:
        raise SpecError(faults)
    return found


def _check_given(spec: InputSpec, file_format: str, schema: pa.Schema, hive: dict[str, pa.DataType]) -> None:
    """:raises SpecError: for columns that the spec gives a type which they cannot have."""
    faults = []
    for name in spec.types:
        if name not in schema.names:
            faults.append(f"input.types: column {name!r} not in input (has: {', '.join(schema.names)})")
        elif name not in hive and file_format == "parquet":
            faults.append(
                f"input.types: column {name!r} has its type in the Parquet files; types are given for JSONL, CSV and "
                "key=value folders alone"
            )
        elif pa.types.is_nested(schema.field(name).type) and (file_format == "csv" or name in hive):
            faults.append(
                f"input.types: column {name!r} cannot be {schema.field(name).type}, since its values are plain texts; use string"
            )
    if faults:
        raise SpecError(faults)


def _read_footers(
    fs: pafs.FileSystem, root: str, files: list[SourceFile], file_format: str, types: Types, notes: list[str]
) -> tuple[dict[str, Footer], dict[str, str]]:
    """Footers of the files that have one, and the reasons of those that should; what to mind goes to notes."""

    def read(file: SourceFile) -> Footer | str:
        try:
            return _parquet_footer(fs, f"{root}/{file.path}", file.size)
        except READ_ERRORS as error:
            return one_line(error)

    if file_format != "parquet":
        made = (jsonl_schemas if file_format == "jsonl" else csv_schemas)(fs, root, files, types)
        notes += made.notes
        return _text_footers(made)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(read, files))
    pairs = [(file.path, result) for file, result in zip(files, results, strict=True)]
    return (
        {path: result for path, result in pairs if isinstance(result, Footer)},
        {path: result for path, result in pairs if isinstance(result, str)},
    )


def _parquet_footer(fs: pafs.FileSystem, path: str, size: int) -> Footer:
    if size == 0:
        raise ValueError("the file is empty (0 bytes), which is not Parquet")
    with pq.ParquetFile(path, filesystem=fs) as file:
        metadata, schema = file.metadata, file.schema_arrow
    refuse_repeated(schema.names)
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    rows = np.fromiter((group.num_rows for group in groups), np.int64, len(groups))
    sizes = np.fromiter((group.total_byte_size for group in groups), np.int64, len(groups))
    return Footer(schema.remove_metadata(), rows, sizes, class_names(schema))


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Names of numbered classes as `datasets` keeps them in a Parquet file: of ClassLabels and lists of these.

    Source: `Features.arrow_schema` in datasets' features.py.
    """
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):  # written by something else
        return {}
    named = {name: _class_label(feature) for name, feature in features.items()}
    return {name: names for name, names in named.items() if names}


def _class_label(feature: Any) -> tuple[str, ...]:
    """Names of a feature that is a ClassLabel or a list of such; in older versions lists stand for lists."""
    while (isinstance(feature, list) and feature) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    is_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return tuple(feature.get("names", ())) if is_label else ()


_NO_GROUPS = np.zeros(0, np.int64)


def _text_footers(schemas: TextSchemas) -> tuple[dict[str, Footer], dict[str, str]]:
    """What text files have in place of footers."""
    footers = {path: Footer(schema, _NO_GROUPS, _NO_GROUPS) for path, schema in schemas.schemas.items()}
    return footers, schemas.broken


def _unify(footers: dict[str, Footer], hive: dict[str, pa.DataType]) -> pa.Schema:
    """One schema for all files: columns united, types widened, dictionaries decoded, everything nullable."""
    merged: dict[str, pa.Field] = {}
    origin: dict[str, str] = {}
    faults: dict[str, str] = {}
    seen: list[pa.Schema] = []
    for path, footer in footers.items():
        if any(footer.schema.equals(other) for other in seen):
            continue
        seen.append(footer.schema)
        for column in footer.schema:
            mine = pa.field(column.name, _plain(column.type))
            name = column.name
            try:
                before = [pa.schema([merged[name]])] if name in merged else []
                united = pa.unify_schemas([*before, pa.schema([mine])], promote_options="permissive").field(0)
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                faults.setdefault(
                    name,
                    f"column {name!r} is {merged[name].type} in {origin[name]} but {mine.type} in {path}; "
                    "rewrite one of the files, or choose files with a glob in input.path",
                )
                continue
            if name not in merged or not united.equals(merged[name]):
                merged[name], origin[name] = united, path
    if faults:
        raise SpecError(list(faults.values()))
    columns = [(name, column.type) for name, column in merged.items() if name not in hive]
    return pa.schema([*columns, *hive.items()])


def _plain(kind: pa.DataType) -> pa.DataType:
    """Dictionaries and views as what they stand for: one column may be both in different files."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind
