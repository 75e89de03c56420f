"""Types of Parquet columns: the plain type of a column, the common type of two files, and conversions.

Arrow has several layouts for one kind of value (views, dictionaries), and most of its functions do not support them
inside lists and structs. Columns are therefore read in the plain layout. Extension types are kept, since they give
values a meaning; computations use their storage, such as bytes or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_INTEGER_DIGITS = {8: 3, 16: 5, 32: 10, 64: 20}
_FLOAT_BITS = {16: 11, 32: 24, 64: 53}
"""Bits of the integers that a float holds exactly, by its width."""


def fields_of(kind: pa.DataType) -> list[pa.Field]:
    """Returns the fields of a nested type; empty for other types."""
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    if _is_list(kind) or pa.types.is_fixed_size_list(kind):
        return [kind.value_field]
    return list(kind) if pa.types.is_struct(kind) else []


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type that a column is read as: no dictionaries, and no views of text, bytes or lists, at any depth."""
    if isinstance(kind, pa.BaseExtensionType):
        return _with_plain_storage(kind)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    return _rebuilt(kind, plain_type)


def storage_type(kind: pa.DataType) -> pa.DataType:
    """Returns a plain type without extension types, at any depth: the type for tasks and SQL."""
    if isinstance(kind, pa.BaseExtensionType):
        return storage_type(kind.storage_type)
    return _rebuilt(kind, storage_type)


def _with_plain_storage(kind: pa.BaseExtensionType) -> pa.DataType:
    plain = plain_type(kind.storage_type)
    if plain.equals(kind.storage_type):
        return kind
    if isinstance(kind, pa.JsonType):
        return pa.json_(plain)
    if isinstance(kind, pa.OpaqueType):
        return pa.opaque(plain, kind.type_name, kind.vendor_name)
    return plain


def _rebuilt(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Returns a nested type with the types of its fields changed."""
    fields = [field.with_type(change(field.type)) for field in fields_of(kind)]
    if pa.types.is_struct(kind):
        return pa.struct(fields)
    if pa.types.is_map(kind):
        return pa.map_(*fields, keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(fields[0])
    return pa.list_(fields[0]) if fields else kind


def convert(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    """Converts a column to another type that holds its values.

    :raises pa.ArrowInvalid: if a value does not fit.
    """
    if column.type.equals(kind):
        return column
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array([convert(chunk, kind) for chunk in column.chunks], kind)
    storage = storage_type(kind)
    if _casts_wrongly(column.type):
        return _named(_rebuilt_as(column, storage), kind)
    plain = column.cast(storage)
    return plain if storage.equals(kind) else _named(plain, kind)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Converts the columns of a table, which have the names and order of a schema, to the types of the schema."""
    columns = [convert(column, kind) for column, kind in zip(table.columns, schema.types, strict=True)]
    return pa.Table.from_arrays(columns, schema=schema)


def _casts_wrongly(kind: pa.DataType) -> bool:
    """Returns whether pyarrow 26 may create invalid arrays when it casts a type.

    It does for list views, for nulls in structs in lists, and for extension types whose storage is a view.
    """
    if isinstance(kind, pa.BaseExtensionType):
        storage = kind.storage_type
        return _casts_wrongly(storage) or not plain_type(storage).equals(storage)
    view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return view or pa.types.is_null(kind) or any(map(_casts_wrongly, _types_in(kind)))


def _rebuilt_as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Casts an array level by level. :param kind: a storage type; names of list items may change."""
    if isinstance(array.type, pa.BaseExtensionType):
        return _rebuilt_as(array.storage, kind)
    if not fields_of(array.type):
        return array.cast(kind)
    null, inner = array.is_null(), _types_in(kind)
    if pa.types.is_struct(kind):
        has = array.type.names
        fields = [
            _rebuilt_as(array.field(field.name), field.type)
            if field.name in has
            else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=null)
    if pa.types.is_fixed_size_list(kind):
        items = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return pa.FixedSizeListArray.from_arrays(_rebuilt_as(items, *inner), kind.list_size, mask=null)
    offsets, items = _offsets(array)
    if pa.types.is_map(kind):
        both = map(_rebuilt_as, items, inner)
        return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), *both, mask=null)
    if pa.types.is_large_list(kind):
        return pa.LargeListArray.from_arrays(
            pa.array(offsets, pa.int64()), _rebuilt_as(*items, *inner), mask=null
        )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _rebuilt_as(*items, *inner), mask=null)


def _offsets(array: pa.Array) -> tuple[np.ndarray, list[pa.Array]]:
    """Returns the offsets of an array's lists, from 0 and with the end, and its items; of a map keys and values."""
    kind = array.type
    if pa.types.is_map(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_numpy()
    else:
        return _items_in_order(array)
    children = [array.keys, array.items] if pa.types.is_map(kind) else [array.values]
    return offsets - offsets[0], [child.slice(offsets[0], offsets[-1] - offsets[0]) for child in children]


def _items_in_order(array: pa.Array) -> tuple[np.ndarray, list[pa.Array]]:
    """Like `_offsets`, for list views, which may be in any order and overlap, and for fixed-size lists.

    Does not use `flatten` and `take` before the items have plain types: pyarrow 26 returns wrong values for extension
    types over views.
    """
    kind = array.type
    lengths = pc.if_else(array.is_null(), 0, pc.list_value_length(array)).to_numpy()
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if pa.types.is_fixed_size_list(kind):
        starts = (array.offset + np.arange(len(array))) * kind.list_size
    else:
        starts = array.offsets.to_numpy()
    shifts = (starts - ends[:-1])[lengths > 0]
    if not len(shifts):
        return ends, [array.values.slice(0, 0)]
    if (shifts == shifts[0]).all():
        return ends, [array.values.slice(shifts[0], ends[-1])]
    places = np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])
    items = _rebuilt_as(array.values, storage_type(plain_type(array.values.type)))
    return ends, [items.take(pa.array(places))]


def _named(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Relabels an array with a type of the same layout, sharing buffers; pyarrow has no cast to extensions in lists."""
    return pa.array(_Relabelled(array, kind))


class _Relabelled:
    """Exports an array with another type of the same layout through Arrow's C data interface."""

    def __init__(self, array: pa.Array, kind: pa.DataType) -> None:
        self._array, self._kind = array, kind

    def __arrow_c_array__(self, requested_schema: Any = None) -> tuple[Any, Any]:
        return self._kind.__arrow_c_schema__(), self._array.__arrow_c_array__()[1]


def empty_table(schema: pa.Schema) -> pa.Table:
    """Creates a table without rows; `Schema.empty_table` does not support extension types in lists and structs."""
    return pa.Table.from_batches([], schema)


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """Returns the smallest type that holds every value of two plain types exactly; None if there is none.

    Values keep their kind: text stays text, and numbers are not rounded. Times of different units get the finer unit,
    except nanoseconds, which only reach from 1677 to 2262.
    """
    if first.equals(second) or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    first, second = _nullable(storage_type(first)), _nullable(storage_type(second))
    schemas = [pa.schema([("", kind)]) for kind in (first, second)]
    try:
        both = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return both if _holds(both, first) and _holds(both, second) else None


def _nullable(kind: pa.DataType) -> pa.DataType:
    """Makes the fields of structs nullable, since structs of another file may lack them."""
    if not pa.types.is_struct(kind):
        return _rebuilt(kind, _nullable)
    return pa.struct([field.with_type(_nullable(field.type)).with_nullable(True) for field in kind])


def _holds(wide: pa.DataType, narrow: pa.DataType) -> bool:
    """Returns whether a type holds every value of another one, exactly and as the same kind of value."""
    types = pa.types
    if wide.equals(narrow) or types.is_null(narrow):
        return True
    if types.is_integer(narrow):
        return _holds_integers(wide, narrow)
    if types.is_floating(narrow):
        return types.is_floating(wide) and wide.bit_width >= narrow.bit_width
    if types.is_decimal(narrow):
        digits = narrow.precision - narrow.scale
        return types.is_decimal(wide) and wide.scale >= narrow.scale and wide.precision - wide.scale >= digits
    if types.is_string(narrow):
        return types.is_large_string(wide)
    if types.is_binary(narrow) or types.is_fixed_size_binary(narrow):
        return types.is_large_binary(wide) or types.is_binary(wide)
    if types.is_time(narrow) or types.is_date(narrow):
        same = types.is_time(wide) if types.is_time(narrow) else types.is_date(wide)
        return same and wide.bit_width >= narrow.bit_width
    if types.is_timestamp(narrow) or types.is_duration(narrow):
        same = wide.id == narrow.id and getattr(wide, "tz", None) == getattr(narrow, "tz", None)
        return same and wide.unit != "ns"
    return _holds_nested(wide, narrow)


def _holds_integers(wide: pa.DataType, narrow: pa.DataType) -> bool:
    signed = pa.types.is_signed_integer(narrow)
    if pa.types.is_integer(wide):
        if pa.types.is_signed_integer(wide):
            return bool(wide.bit_width > narrow.bit_width or (signed and wide.bit_width == narrow.bit_width))
        return bool(not signed and wide.bit_width >= narrow.bit_width)
    if pa.types.is_floating(wide):
        return bool(_FLOAT_BITS[wide.bit_width] >= narrow.bit_width - signed)
    return bool(
        pa.types.is_decimal(wide) and wide.precision - wide.scale >= _INTEGER_DIGITS[narrow.bit_width]
    )


def _holds_nested(wide: pa.DataType, narrow: pa.DataType) -> bool:
    types = pa.types
    if types.is_struct(narrow):
        return types.is_struct(wide) and all(
            _holds(wide.field(field.name).type, field.type) for field in narrow
        )
    if types.is_map(narrow):
        same = types.is_map(wide)
    elif types.is_fixed_size_list(narrow):
        same = _is_list(wide) or (types.is_fixed_size_list(wide) and wide.list_size == narrow.list_size)
    else:
        same = _is_list(narrow) and _is_list(wide)
    return same and all(map(_holds, _types_in(wide), _types_in(narrow)))


def _types_in(kind: pa.DataType) -> list[pa.DataType]:
    return [field.type for field in fields_of(kind)]


def _is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is a variable-size list of any layout."""
    types = pa.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def arrays_of(table: pa.Table, names: Mapping[str, str]) -> dict[str, pa.Array]:
    """Returns columns of a table, each as one array.

    :param names: maps the names in the result to columns.
    :raises pa.ArrowInvalid: for a column of more than 2 GiB of text or bytes.
    """
    columns = {name: table[column].combine_chunks() for name, column in names.items()}
    return {
        name: pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
        for name, column in columns.items()
    }
