"""Parses JSONL, one JSON object per line. An invalid line becomes a bad row; all others are kept.

pyarrow parses all lines at once. Before that, a vectorised check of the bytes finds lines that pyarrow would crash on
(a line `null` or deep nesting ends the process), or would not parse as exactly one row. If anything is irregular,
Python's parser parses each line separately.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from hfbatch.data.formats.base import BadRow, Parsed, Wanted
from hfbatch.data.formats.lines import (
    BOM,
    RETURN,
    SPACE,
    TAB,
    misfit,
    newlines,
    shown,
    with_nulls,
)
from hfbatch.data.formats.texttypes import convert

MOST_DEPTH = 128
"""Deepest nesting of a row; pyarrow's parser recurses and overflows the stack at some thousands of levels."""
_EXACT_WHOLE = 2**53
_BRACES = (123, 125)
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "bytes that are not UTF-8"
_IS_BLANK = np.zeros(256, bool)
_IS_BLANK[[TAB, RETURN, SPACE, 10]] = True


def starts_of_rows(view: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the starts of lines that are not blank. :param ends: positions of the line feeds, int64."""
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (view[starts] > SPACE).all():
        return starts
    solid = np.add.reduceat(~_IS_BLANK[view[: ends[-1] + 1]], starts, dtype=np.int64)
    return starts[solid > 0]


def split_lines(data: bytes) -> list[bytes]:
    """Returns the lines that are not blank, without line feeds."""
    return [line for line in data.split(b"\n") if line.strip(b"\t\r ")]


def parse(data: bytes, wanted: Wanted) -> Parsed:
    """Parses the rows in some lines."""
    if not data.strip(b"\t\r\n "):
        return Parsed(wanted.schema.empty_table())
    data = data if data.endswith(b"\n") else data + b"\n"
    count = _plain_rows(data)
    table = None if count is None else _all_at_once(data, count, wanted)
    return _line_by_line(data, wanted) if table is None else Parsed(table)


def _plain_rows(data: bytes) -> int | None:
    """Returns the number of lines that hold rows, if each looks like an object and none is nested deeply; else None.

    If pyarrow then finds as many rows, each line is one: no line feed can be between `}` and `{` inside of an object.
    """
    if b"\0" in data:
        return None
    view = np.frombuffer(data, np.uint8)
    ends = newlines(view)
    starts = starts_of_rows(view, ends)
    ends = ends[np.searchsorted(ends, starts)]
    last = view[ends - 1]
    if (last == RETURN).any():
        last = np.where(last == RETURN, view[np.maximum(ends - 2, 0)], last)
    if (view[starts] != _BRACES[0]).any() or (last != _BRACES[1]).any():
        return None
    brackets = np.flatnonzero((view == 91) | (view == 123))
    counts = np.diff(np.searchsorted(brackets, np.append(starts, len(view))))
    many = np.flatnonzero(counts > MOST_DEPTH)
    return None if any(depth(data[starts[at] : ends[at]]) > MOST_DEPTH for at in many) else len(starts)


def depth(line: bytes) -> int:
    """Returns the nesting depth of a line, without brackets in strings."""
    view = np.frombuffer(_STRINGS.sub(b"", line), np.uint8)
    steps = ((view == 91) | (view == 123)).astype(np.int8) - ((view == 93) | (view == 125))
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def _all_at_once(data: bytes, count: int, wanted: Wanted) -> pa.Table | None:
    """Parses all lines with pyarrow; returns None if one does not fit. :param count: the expected number of rows."""
    given = {name for name in wanted.given if not _is_native(wanted.schema.field(name).type)}
    try:
        table = read_block(data, wanted.schema, "infer" if wanted.whole else "ignore")
    except pa.ArrowInvalid:
        return None
    more = table.column_names[len(wanted.schema) :]
    if len(table) != count or given or any(not pa.types.is_null(table[name].type) for name in more):
        return None
    table = table.select(wanted.schema.names)
    if table.schema.types != wanted.schema.types or any(_is_large(column) for column in table.columns):
        return None
    return table


def read_block(data: bytes, schema: pa.Schema | None, unexpected: str) -> pa.Table:
    """Parses lines with pyarrow. :raises pa.ArrowInvalid: if one cannot be parsed."""
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected)
    # One block, since pyarrow fails on rows longer than two of its blocks of 1 MiB.
    table = pa.json.read_json(pa.BufferReader(data), pa.json.ReadOptions(block_size=len(data) + 1), options)
    table.validate(full=True)  # The parser accepts text that is not UTF-8.
    return table


def _is_native(kind: pa.DataType) -> bool:
    """Returns whether pyarrow's JSON parser supports this type."""
    return not (pa.types.is_date(kind) or pa.types.is_decimal(kind))


def _is_large(column: pa.ChunkedArray) -> bool:
    """Returns whether a column holds doubles so large that integers in the file may have been rounded."""
    return any(_has_large(chunk) for chunk in column.chunks)


def _has_large(array: pa.Array) -> bool:
    if pa.types.is_list(array.type):
        return _has_large(array.flatten())
    if pa.types.is_struct(array.type):
        return any(_has_large(one) for one in array.flatten())
    if not pa.types.is_float64(array.type):
        return False
    return bool(pc.any(pc.and_(pc.is_finite(array), pc.greater_equal(pc.abs(array), _EXACT_WHOLE))).as_py())


class Object(dict[str, Any]):
    """A JSON object that records a repeated key."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = Counter(name for name, _ in pairs) if len(self) < len(pairs) else {}
        self.twice = next((name for name, count in names.items() if count > 1), None)


class BadLineError(ValueError):
    """A line is not a valid row. :param error: the kind of fault, in one word."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(message)
        self.error = error


def load(line: bytes) -> Object:
    """Parses a line to an object; bytes that are not UTF-8 become lone surrogates.

    :raises ValueError: with the reason, if the line is not a valid row.
    """
    if b"\0" in line:
        raise BadLineError("NotJSON", "the line holds NUL bytes, as left by a crash; remove the line")
    if line.count(b"[") + line.count(b"{") > MOST_DEPTH and (levels := depth(line)) > MOST_DEPTH:
        raise BadLineError(
            "TooDeep", f"the line is nested {levels:,} levels deep; at most {MOST_DEPTH} are read"
        )
    text = line.removeprefix(BOM).decode("utf8", "surrogateescape")
    try:
        found = json.loads(text, object_pairs_hook=Object, parse_float=_real, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise BadLineError(
            "NotJSON", f"the line is not JSON: {error.msg} at character {error.colno}"
        ) from error
    if not isinstance(found, Object):
        raise BadLineError("NotJSON", f"the line holds {_describe(found)}, not a JSON object")
    if _ESCAPED_SURROGATE.search(line) and _has_lone_surrogate(line):
        raise BadLineError(
            "LoneSurrogate",
            "the line holds half of a surrogate pair, such as \\ud800, which is not a character and cannot be written as "
            "UTF-8; write the whole pair, or \\ufffd in its place",
        )
    return found


def _has_lone_surrogate(line: bytes) -> bool:
    clean = json.loads(line.removeprefix(BOM).decode("utf8", "replace"))
    return _SURROGATE.search(json.dumps(clean, ensure_ascii=False)) is not None


def _real(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadLineError(
            "NumberTooLarge", f"the number {text[:40]} is larger than a double can hold; write it as text"
        )
    return number


def _whole(text: str) -> int:
    if len(text) > 300:
        _real(text)
    return int(text)


def _describe(value: Any) -> str:
    """Describes a JSON value in a few words."""
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return f"the number {value}" if not isinstance(value, bool) else str(value).lower()
        case str():
            return f"the text {value!r}" if len(value) < 60 else f"a text of {len(value):,} characters"
    return "a list" if isinstance(value, list) else "an object"


def _line_by_line(data: bytes, wanted: Wanted) -> Parsed:
    """Parses each line separately, with Python's parser."""
    lines = split_lines(data)
    found = Parsed(wanted.schema.empty_table())
    good: list[tuple[int, bytes]] = []
    unplanned: Counter[str] = Counter()
    for position, line in enumerate(lines):
        try:
            row = load(line)
            good.append((position, _checked(line, row, wanted)))
        except BadLineError as error:
            found.bad.append(BadRow(position, error.error, str(error), shown(line)))
        else:
            unplanned.update(_others(row, wanted.schema) if wanted.whole else ())
    schema = pa.schema([(f.name, f.type if _is_native(f.type) else pa.string()) for f in wanted.schema])
    tables, bad = _isolate(good, schema)
    found.bad += [BadRow(at, "Misfit", _translated(why, wanted.section), shown(lines[at])) for at, why in bad]
    failed = {row.position for row in found.bad}
    kept = np.array([position for position, _ in good if position not in failed], np.int64)
    table = with_nulls(pa.concat_tables([schema.empty_table(), *tables]), kept, len(lines))
    found.table = _converted(table, wanted, found.bad, lines)
    found.bad.sort(key=lambda row: row.position)
    found.unplanned = dict(unplanned)
    return found


def _checked(line: bytes, row: Object, wanted: Wanted) -> bytes:
    """Checks a line; rewrites it if the spec reads some of its values as text. :raises BadLineError: for a misfit."""
    changed: dict[str, str] = {}
    for field in wanted.schema:
        name, value = field.name, row.get(field.name)
        if row.twice == name:
            raise BadLineError("RepeatedKey", f"the line has the key {name!r} twice; leave one of them out")
        if value is None:
            continue
        given = name in wanted.given
        if (
            given
            and not isinstance(value, str)
            and (pa.types.is_string(field.type) or not _is_native(field.type))
        ):
            changed[name] = _as_written(line, name)
        elif given and not _is_native(field.type):
            continue
        elif (wrong := misfit_of(value, field.type, exact=not given)) is _NOT_UTF8:
            raise BadLineError("NotUTF8", f"column {name!r} holds {wrong}; save the file as UTF-8")
        elif wrong:
            raise BadLineError("Misfit", misfit(name, field.type, wrong, wanted.section))
    line = line.removeprefix(BOM)
    return json.dumps({**row, **changed}).encode() if changed else line


def _as_written(line: bytes, name: str) -> str:
    """Returns a value as text, with numbers as written in the file."""
    text = line.removeprefix(BOM).decode("utf8", "replace")
    value = json.loads(text, parse_float=str, parse_int=str)[name]
    return value if isinstance(value, str) else json.dumps(json.loads(text)[name], ensure_ascii=False)


def misfit_of(value: Any, kind: pa.DataType, exact: bool) -> str | None:
    """Describes a value that is not of a type; returns None if it fits, or if pyarrow's parser checks it."""
    if value is None:
        return None
    if pa.types.is_list(kind):
        if not isinstance(value, list):
            return _describe(value)
        return next((wrong for item in value if (wrong := misfit_of(item, kind.value_type, exact))), None)
    if pa.types.is_struct(kind):
        if not isinstance(value, Object):
            return _describe(value)
        if value.twice is not None:
            return f"an object with the key {value.twice!r} twice"
        return next((w for f in kind if (w := misfit_of(value.get(f.name), f.type, exact))), None)
    if pa.types.is_string(kind) or pa.types.is_timestamp(kind):
        if not isinstance(value, str):
            return _describe(value)
        return _NOT_UTF8 if _SURROGATE.search(value) else None
    if pa.types.is_boolean(kind):
        return None if isinstance(value, bool) else _describe(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _describe(value)
    if pa.types.is_integer(kind):
        bits, low = kind.bit_width, pa.types.is_signed_integer(kind)
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low else (0, 2**bits - 1)
        return None if isinstance(value, int) and least <= value <= most else _describe(value)
    if exact and isinstance(value, int) and float(value) != value:
        return f"the whole number {value}, which a double does not hold exactly"
    return None


def _others(row: dict[str, Any], schema: pa.Schema) -> list[str]:
    """Returns the names of columns with a value that are not in a schema, those within structs with a dot."""
    found = [name for name, value in row.items() if value is not None and schema.get_field_index(name) < 0]
    for field in schema:
        inner = row.get(field.name)
        if pa.types.is_struct(field.type) and isinstance(inner, dict):
            found += [f"{field.name}.{name}" for name in _others(inner, pa.schema(list(field.type)))]
    return found


def _isolate(
    lines: Sequence[tuple[int, bytes]], schema: pa.Schema
) -> tuple[list[pa.Table], list[tuple[int, str]]]:
    """Returns tables of the lines that pyarrow accepts, in order, and the positions of the others with the error."""
    if not lines:
        return [], []
    try:
        return [read_block(b"\n".join(line for _, line in lines) + b"\n", schema, "ignore")], []
    except pa.ArrowInvalid as error:
        if len(lines) == 1:
            return [], [(lines[0][0], str(error))]
    middle = len(lines) // 2
    (tables, bad), (more, worse) = _isolate(lines[:middle], schema), _isolate(lines[middle:], schema)
    return tables + more, bad + worse


def _translated(reason: str, section: str) -> str:
    reason = reason.removeprefix("JSON parse error: ").replace(" in row 0", "")
    return (
        f"the row does not fit the columns' types: {reason}; fix the row, or give the type in {section}.types"
    )


def _converted(table: pa.Table, wanted: Wanted, bad: list[BadRow], lines: Sequence[bytes]) -> pa.Table:
    """Converts columns that were read as text to the types of the spec."""
    columns = []
    already = {row.position for row in bad}
    for field in wanted.schema:
        column = table[field.name]
        if not column.type.equals(field.type):
            texts = column.combine_chunks()
            column, misfits = convert(texts, field.type, exact=False)
            for at in np.flatnonzero(misfits).tolist():
                if at not in already:
                    already.add(at)
                    message = misfit(field.name, field.type, repr(texts[at].as_py()), wanted.section)
                    bad.append(BadRow(at, "Misfit", message, shown(lines[at])))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=wanted.schema)
