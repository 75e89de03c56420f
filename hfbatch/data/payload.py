"""Tables as bytes between stages: an Arrow IPC stream. Knows nothing of what the tables hold."""

from __future__ import annotations

import pyarrow as pa


def pack(table: pa.Table) -> pa.Buffer:
    """A table as one Arrow IPC stream, schema metadata included; a slice carries its own rows only."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_column(stream: pa.Buffer | None) -> pa.Array:
    """A stream as a large_binary array of one value, without copying it."""
    if stream is None:
        return pa.nulls(1, pa.large_binary())
    offsets = pa.array([0, stream.size], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, stream])


def unpack(stream: pa.Buffer) -> pa.Table:
    """The reverse of pack; the table's columns are views on the stream."""
    with pa.ipc.open_stream(stream) as reader:
        return reader.read_all()
