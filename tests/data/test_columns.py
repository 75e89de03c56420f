"""Columns of every Arrow type: from a Parquet file through a split, the stages and a part, values unchanged."""

from __future__ import annotations

import base64
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.formats.columns import common_type, convert, plain_type, storage_type
from hfbatch.data.serialization import deserialize, serialize
from hfbatch.data.splits import Piece, Split
from hfbatch.output.layout import rejects_of
from hfbatch.output.manifest import Manifest
from hfbatch.output.rejects import Reject, reject_schema, rejects_table
from hfbatch.output.sinks.parquet import PartWriter
from hfbatch.output.writer import stored_schema
from tests.data.inputs import read_all, source_of

TIMES = st.integers(-(2**50), 2**50)


def numbers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


def decimals(digits: int) -> st.SearchStrategy[Decimal]:
    return st.integers(-(10**digits) + 1, 10**digits - 1).map(lambda units: Decimal(units).scaleb(-2))


TEXT, BYTES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.binary(max_size=20)
LEAVES: list[tuple[pa.DataType, st.SearchStrategy[Any]]] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *((pa.type_for_alias(f"int{bits}"), numbers(bits, True)) for bits in (8, 16, 32, 64)),
    *((pa.type_for_alias(f"uint{bits}"), numbers(bits, False)) for bits in (8, 16, 32, 64)),
    *((kind, st.floats(width=kind.bit_width, allow_nan=False)) for kind in (pa.float16(), pa.float32(), pa.float64())),
    (pa.decimal32(9, 2), decimals(9)),
    (pa.decimal64(18, 2), decimals(18)),
    (pa.decimal128(28, 2), decimals(28)),
    (pa.decimal256(28, 2), decimals(28)),
    *((kind, TEXT) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *((kind, BYTES) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.date32(), st.dates()),
    (pa.date64(), st.dates()),
    (pa.time32("s"), st.integers(0, 86399)),
    (pa.time64("ns"), st.integers(0, 86399 * 10**9)),
    *((pa.timestamp(unit, zone), TIMES) for unit in ("us", "ns") for zone in (None, "UTC", "Asia/Tokyo", "+05:30")),
    *((pa.duration(unit), TIMES) for unit in ("us", "ns")),
    (pa.dictionary(pa.int8(), pa.string()), TEXT),
    (pa.dictionary(pa.int32(), pa.int64()), numbers(64, True)),
    (pa.json_(), TEXT.map(repr)),
    (pa.json_(pa.string_view()), TEXT.map(repr)),
    (pa.uuid(), st.binary(min_size=16, max_size=16)),
    (pa.bool8(), st.sampled_from([0, 1])),
    (pa.fixed_shape_tensor(pa.float32(), [2]), st.just([1.0, 2.0])),
    (pa.opaque(pa.binary(), "geometry", "acme"), BYTES),
]  # fmt: skip
Column = tuple[pa.DataType, st.SearchStrategy[Any]]


def lists(item: Column) -> st.SearchStrategy[Column]:
    kind, values = item
    some = st.lists(values, max_size=3)
    two = st.lists(values, min_size=2, max_size=2)
    makers = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]
    return st.sampled_from([*((make(kind), some) for make in makers), (pa.list_(kind, 2), two)])


def structs(fields: list[Column]) -> Column:
    kinds = [(f"f{at}", kind) for at, (kind, _) in enumerate(fields)]
    return pa.struct(kinds), st.fixed_dictionaries(
        {f"f{at}": values for at, (_, values) in enumerate(fields)}
    )


def maps(item: Column) -> Column:
    kind, values = item
    return pa.map_(pa.string(), kind), st.dictionaries(TEXT, values, max_size=3).map(
        lambda of: list(of.items())
    )


COLUMNS = st.recursive(
    st.sampled_from([(kind, st.none() | values) for kind, values in LEAVES]),
    lambda inner: st.one_of(
        inner.flatmap(lists), st.lists(inner, min_size=1, max_size=3).map(structs), inner.map(maps)
    ).map(lambda column: (column[0], st.none() | column[1])),
    max_leaves=4,
)


def write(path: Path, kind: pa.DataType, column: pa.Array) -> None:
    """A Parquet file whose column has a type, in row groups of three rows.

    Its values are plain ones, as pyarrow writes no views inside lists. The type is in the file's Arrow schema,
    where other writers, such as Polars, put it.
    """
    said = pa.schema([("n", pa.int64()), ("x", kind)])
    table = pa.table({"n": range(len(column)), "x": column})
    with pq.ParquetWriter(path, table.schema, store_schema=False) as writer:
        writer.write_table(table, row_group_size=3)
        writer.add_key_value_metadata({"ARROW:schema": base64.b64encode(said.serialize())})


def plain_values(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Values to compare with: of times the numbers, since Python knows only the years 1 to 9999."""
    return convert(column, storage_type(plain_type(column.type))).to_pylist()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_column_of_any_type_passes_through_split_filter_stages_part_and_rejects(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    kind, values = data.draw(COLUMNS)
    rows = data.draw(st.lists(values, min_size=1, max_size=8))
    column = pa.array(rows, storage_type(plain_type(kind)))
    for name in ("a", "b"):
        write(folder / f"{name}.parquet", kind, column)
    expected = plain_values(column) * 2
    source = source_of(folder)
    assert source.schema.field("x").type == plain_type(pq.read_schema(folder / "a.parquet").field("x").type)
    splits = source.cut(2)
    assert plain_values(read_all(source, splits).table["x"]) == expected
    rows_read = read_all(source, splits, "n >= 0")
    table = deserialize(serialize(rows_read.table.slice(1)))
    assert plain_values(table["x"]) == expected[1:]
    chosen = pa.array(range(0, len(table), 2), pa.int64())
    part, count = table.take(chosen), len(rows_read.table)
    rejected = rejects_table(
        rows_read,
        [Reject(at, "forward", "E", "m") for at in range(count - len(part))],
        reject_schema(source.schema),
    )
    split = Split((Piece("a.parquet", 0, count, 1, 1),))
    reported = Manifest(
        split.part, rows_read=count, rows_in=count, rows_out=len(part), rows_rejected=len(rejected)
    )
    PartWriter(str(folder / "out"), source.schema, reject_schema(source.schema), {}).write(
        split, part, rejected, reported
    )
    written = pq.read_table(folder / "out" / split.part)
    assert written.schema.equals(stored_schema(source.schema).remove_metadata())
    assert plain_values(written["x"]) == expected[1::2]
    again = pq.read_table(folder / "out" / rejects_of(split.part))
    assert plain_values(again["x"]) == expected[: len(rejected)]


NUMBERS = [kind for kind, _ in LEAVES if pa.types.is_integer(kind) or pa.types.is_floating(kind)]


def extremes(kind: pa.DataType) -> list[float]:
    if pa.types.is_floating(kind):
        return [0.5, float(np.finfo(kind.to_pandas_dtype()).max)]
    limits = np.iinfo(kind.to_pandas_dtype())
    return [int(limits.min), int(limits.max), int(limits.max) - 1]


@pytest.mark.parametrize("wrap", [lambda kind: kind, pa.list_, lambda kind: pa.struct([("x", kind)])])
def test_numbers_of_two_types_become_one_type_only_where_no_value_changes(wrap):
    united = 0
    for first in NUMBERS:
        for second in NUMBERS:
            both = common_type(wrap(first), wrap(second))
            assert both == common_type(wrap(second), wrap(first))
            if both is None:
                assert {first, second} & {pa.int64(), pa.uint64()}
                continue
            united += 1
            for kind in (first, second):
                inner = pa.array(extremes(kind), kind)
                assert convert(inner, common_type(first, second)).to_pylist() == inner.to_pylist()
    assert united == 101


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.int64(), pa.float64(), None),
        (pa.timestamp("us"), pa.timestamp("ns"), None),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), None),
        (pa.duration("ms"), pa.duration("ns"), None),
        (pa.time32("s"), pa.time64("ns"), pa.time64("ns")),
        (pa.date32(), pa.timestamp("us"), None),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.binary(), None),
        (pa.binary(3), pa.binary(4), pa.binary()),
        (pa.decimal128(5, 2), pa.decimal128(7, 1), pa.decimal128(8, 2)),
        (pa.decimal128(38, 0), pa.decimal128(38, 38), pa.decimal256(76, 38)),
        (pa.decimal128(5, 2), pa.float64(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.null(), pa.list_(pa.uuid()), pa.list_(pa.uuid())),
        (pa.json_(), pa.string(), pa.string()),
        (pa.list_(pa.null()), pa.large_list(pa.string()), pa.large_list(pa.string())),
        (pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 3), pa.list_(pa.int32())),
        (pa.list_(pa.int64()), pa.list_(pa.float64()), None),
        (pa.struct([("a", pa.int64())]), pa.struct([("a", pa.float64())]), None),
    ],
    ids=str,
)
def test_types_of_two_files_are_united_where_that_loses_nothing(first, second, both):
    assert common_type(first, second) == both
    assert common_type(second, first) == both


def test_structs_of_two_files_have_the_fields_of_both(tmp_path):
    pq.write_table(pa.table({"x": [[{"a": 1, "n": None}]]}), tmp_path / "a.parquet")
    kind = pa.list_(
        pa.struct([pa.field("b", pa.string(), nullable=False), ("a", pa.int32()), ("n", pa.null())])
    )
    pq.write_table(pa.table({"x": pa.array([[{"b": "y", "a": 2}] * 2], kind)}), tmp_path / "b.parquet")
    source = source_of(tmp_path)
    assert read_all(source, source.cut(10)).table["x"].to_pylist() == [
        [{"a": 1, "n": None, "b": None}],
        [{"a": 2, "n": None, "b": "y"}] * 2,
    ]
