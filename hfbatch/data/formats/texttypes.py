"""Types of columns in text files: parses their names, infers them from values, and converts texts to them.

A type is inferred only if the values are kept exactly: `007`, `+1`, `1.10` and `TRUE` stay text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

NULLS = pa.array(pa.csv.ConvertOptions().null_values, pa.string())
"""Texts that mean null in a column that is not text: empty, NA, null and a few more."""
_WHOLE = r"-?[1-9][0-9]{0,18}|0"
_REAL = r"-?(?:0|[1-9][0-9]{0,14}|(?:0|[1-9][0-9]*)\.(?:0|[0-9]*[1-9])(?:[eE][+-]?[0-9]+)?|[1-9]e[+-][0-9]+)"
EXACT = {
    pa.int64(): _WHOLE,
    pa.float64(): _REAL,
    pa.bool_(): "true|false",
    pa.date32(): r"\d{4}-\d\d-\d\d",
    pa.timestamp("s"): r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d",
}
"""Types that can be inferred for columns of CSV, in order of trial, with the exact form of values."""
_LOOSE = (pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
_SURE_LENGTH = 16
"""Characters up to which a double holds a number exactly: 15 digits and the point."""
_SIMPLE = re.compile(
    r"(u?int(8|16|32|64)|float|double|bool|str(ing)?|date32(\[day\])?|"
    r"timestamp\[(s|ms|us|ns)\])"
)
_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), tz=([^\]]+)\]")
_DECIMAL = re.compile(r"decimal128\((\d+), ?(-?\d+)\)")
_LIST = re.compile(r"list<(?:(?:item|element): )?(.+)>")
_STRUCT = re.compile(r"struct<(.+)>")
KNOWN = (
    "string, int64 (and other sizes), double, float, bool, date32, timestamp[us], decimal128(38, 2), list<string>, "
    "struct<a: int64>"
)


def type_of(value: Any) -> pa.DataType:
    """Parses a type in a spec or job.json: a name, [type] for a list, {field: type} for a struct.

    :raises ValueError: if it is not a type.
    """
    match value:
        case [item]:
            return pa.list_(type_of(item))
        case Mapping() if value:
            return pa.struct([(name, type_of(kind)) for name, kind in value.items()])
        case str():
            return _named(value.strip())
    raise ValueError(f"{value!r} is not a type")


def _named(name: str) -> pa.DataType:
    if _SIMPLE.fullmatch(name):
        return pa.type_for_alias(name)
    if found := _ZONED.fullmatch(name):
        return pa.timestamp(found[1], found[2])
    if found := _DECIMAL.fullmatch(name):
        return pa.decimal128(int(found[1]), int(found[2]))
    if found := _LIST.fullmatch(name):
        return pa.list_(_named(found[1].strip()))
    if found := _STRUCT.fullmatch(name):
        pairs = [part.partition(":") for part in _parts(found[1])]
        if all(colon for _, colon, _ in pairs):
            return pa.struct([(field.strip(), _named(kind.strip())) for field, _, kind in pairs])
    raise ValueError(f"{name!r} is not a type")


def _parts(text: str) -> list[str]:
    """Splits the fields between a struct's angle brackets; commas in inner brackets do not separate fields."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<([") - (letter in ">)]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def name_of(kind: pa.DataType) -> Any:
    """Returns a type as plain values for JSON, which `type_of` parses."""
    if pa.types.is_list(kind):
        return [name_of(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: name_of(field.type) for field in kind}
    return str(kind)


def convert(texts: pa.Array, kind: pa.DataType, exact: bool) -> tuple[pa.Array, np.ndarray]:
    """Converts texts to a type; also returns which do not fit, bool [rows], and become null.

    :param texts: strings; those in NULLS become null, unless the type is string.
    :param exact: whether to accept only the exact forms in EXACT, which can be written back unchanged.
    """
    if kind.equals(texts.type):
        return texts, np.zeros(len(texts), bool)
    asked = pc.and_(texts.is_valid(), pc.invert(pc.is_in(texts, NULLS)))
    if exact and kind in EXACT:
        fits = pc.and_(asked, pc.match_substring_regex(texts, f"^(?:{EXACT[kind]})$"))
        values = pc.if_else(fits, texts, None)
    else:
        values = pc.utf8_trim_whitespace(pc.if_else(asked, texts, None))
    array = _cast(values, kind)
    if exact and pa.types.is_float64(kind):
        array = pc.if_else(pa.array(_held(array, values)), array, None)
    misfits = pc.and_(asked, array.is_null())
    return array, misfits.to_numpy(zero_copy_only=False)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Casts values; those that cannot be cast become null."""
    try:
        return pc.cast(values, kind)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, kind)
    middle = len(values) // 2
    return pa.concat_arrays([_cast(values[:middle], kind), _cast(values[middle:], kind)])


def _held(array: pa.Array, values: pa.Array) -> np.ndarray:
    """Returns which doubles are exactly the numbers in their texts, bool."""
    held = pc.fill_null(pc.is_finite(array), False).to_numpy(zero_copy_only=False)
    long = pc.fill_null(pc.greater(pc.utf8_length(values), _SURE_LENGTH), False)
    differs = pc.and_(long, pc.fill_null(pc.not_equal(pc.cast(array, pa.string()), values), False))
    held = held.copy()
    for at in np.flatnonzero(differs.to_numpy(zero_copy_only=False) & held).tolist():
        held[at] = Decimal(repr(array[at].as_py())) == Decimal(values[at].as_py())
    return held


def found_type(texts: pa.Array) -> tuple[pa.DataType, str | None]:
    """Infers the type of texts; if another type was ruled out because it changes a value, also returns the reason.

    :param texts: a sample of a column.
    """
    values = pc.unique(texts)
    if pc.all(pc.is_in(values, NULLS)).as_py() is not False:
        return pa.string(), None
    for kind in EXACT:
        _, misfits = convert(values, kind, exact=True)
        if not misfits.any():
            return kind, None
    for kind in _LOOSE:
        _, misfits = convert(values, kind, exact=False)
        if not misfits.any():
            example = _example(values, kind)
            return pa.string(), f"{example!r} would not be the same as {kind}"
    return pa.string(), None


def _example(values: pa.Array, kind: pa.DataType) -> str:
    """Returns a value that the type does not keep exactly."""
    if kind not in EXACT:
        return str(values[0].as_py())
    _, misfits = convert(values, kind, exact=True)
    return str(values[int(np.flatnonzero(misfits)[0])].as_py())


def fits(text: str, kind: pa.DataType, exact: bool) -> bool:
    """Returns whether `convert` accepts a text as a value of a type other than null."""
    array, _ = convert(pa.array([text]), kind, exact)
    return bool(array.is_valid()[0].as_py())


def texts_note(columns: Sequence[str], most: int = 5) -> list[str]:
    """Returns a note on columns that look like numbers or times and are read as text; none if there are none."""
    if not columns:
        return []
    more = f" and {len(columns) - most} more" if len(columns) > most else ""
    return [
        f"read as text, since a value would change: {', '.join(columns[:most])}{more}; another type can be given in "
        "input.types"
    ]
