"""Input formats: each finds the columns of its files, cuts them into pieces, and reads a piece to columns.

A new format is one new file with a subclass of `Format`, and its kind in FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hfbatch.data.formats.base import Format


@dataclass(frozen=True)
class FormatKind:
    """What is known of a format before it is imported."""

    path: str
    """Module and class."""
    endings: tuple[str, ...]
    """Endings of its files' names, in lower case."""
    magic: tuple[bytes, ...] = ()
    """What its files begin with, by which files without an ending are recognised."""

    def load(self) -> Format:
        """Imports the format."""
        module, _, name = self.path.partition(":")
        made: Any = getattr(import_module(module), name)
        return made()


FORMATS = {
    "parquet": FormatKind(
        "hfbatch.data.formats.parquetfiles:ParquetFormat", (".parquet", ".parq", ".pq"), (b"PAR1", b"PARE")
    ),
    "jsonl": FormatKind("hfbatch.data.formats.jsonlfiles:JsonlFormat", (".jsonl", ".ndjson", ".json")),
    "csv": FormatKind("hfbatch.data.formats.csvfiles:CsvFormat", (".csv", ".tsv")),
}
"""Formats by the name that the spec gives."""
