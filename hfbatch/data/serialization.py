"""Serializes tables between stages as Arrow IPC streams."""

from __future__ import annotations

import pyarrow as pa


def serialize(table: pa.Table) -> pa.Buffer:
    """Serializes a table to one Arrow IPC stream, including schema metadata; of a slice only its own rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_column(stream: pa.Buffer | None) -> pa.Array:
    """Returns a stream as a large_binary array of one value, without a copy."""
    if stream is None:
        return pa.nulls(1, pa.large_binary())
    offsets = pa.array([0, stream.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, stream])


def deserialize(stream: pa.Buffer) -> pa.Table:
    """Reads the result of `serialize`; the table's columns are views on the stream."""
    with pa.ipc.open_stream(stream) as reader:
        return reader.read_all()
