"""Writes files atomically, and serialises tables as Parquet: a reader sees all of a file or none."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from hfbatch.data.filesystem import fsspec_of, is_local
from hfbatch.data.formats.columns import empty_table
from hfbatch.output.layout import TEMPORARY_END

FOOTER_KEY = "hfbatch"


def write_file(
    fs: pafs.FileSystem, path: str, data: bytes | pa.Buffer, check: Callable[[], None] | None = None
) -> None:
    """Writes a file atomically; replaces an existing one.

    Local: a hidden temporary file in the same folder, fsync, rename, fsync of the folder. Object stores: one
    upload, which becomes visible when it is complete.

    :param check: called right before the file becomes visible; an exception in it prevents that.
    :raises OSError: if it cannot be written; no part of it is left then.
    """
    if is_local(fs):
        return _write_local(path, data, check)
    if check is not None:
        check()
    if (inner := fsspec_of(fs)) is not None:
        inner.makedirs(path.rpartition("/")[0], exist_ok=True)
        inner.pipe_file(path, bytes(data))
    else:
        # All bytes exist before the stream is opened, since closing it completes an upload even after an exception.
        with fs.open_output_stream(path) as stream:
            stream.write(data)
    return None


def _write_local(path: str, data: bytes | pa.Buffer, check: Callable[[], None] | None) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY_END}")
    try:
        with open(temporary, "xb") as file:
            file.write(memoryview(data))
            file.flush()
            os.fsync(file.fileno())
        # The check comes last. A process that takes over an output deletes the temporary files, so that a rename after
        # an outdated check fails.
        if check is not None:
            check()
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_table_bytes(table: pa.Table, metadata: Mapping[str, str] | None = None) -> pa.Buffer:
    """Serializes a table as Parquet: zstd level 1, dictionaries for text and bytes only, since floats rarely repeat.

    :param metadata: written to the footer.
    """
    schema = table.schema.with_metadata({**(table.schema.metadata or {}), **(metadata or {})})
    sink = pa.BufferOutputStream()
    names = _byte_columns(table.schema.remove_metadata())
    with pq.ParquetWriter(
        sink, schema, compression="zstd", compression_level=1, use_dictionary=names
    ) as writer:
        if len(table):  # `datasets` cannot read a row group without rows
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    return sink.getvalue()


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """Returns a part's schema as read back from Parquet, which has no times in seconds and renames list items."""
    return pq.read_schema(pa.BufferReader(part_table_bytes(empty_table(schema))))


@lru_cache(maxsize=8)
def _byte_columns(schema: pa.Schema) -> list[str]:
    """Returns the paths of the Parquet columns, nested ones too, that hold text or bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(empty_table(schema), sink)
    leaves = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [
        leaves.column(at).path for at in range(len(leaves)) if leaves.column(at).physical_type == "BYTE_ARRAY"
    ]
