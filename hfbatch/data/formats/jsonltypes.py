"""Infers columns and types from some lines of JSONL."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from hfbatch.data.formats.jsonl import BadLineError, Object, load, misfit_of, split_lines
from hfbatch.data.formats.lines import BOM, misfit
from hfbatch.data.formats.sampling import Inferred

USUAL_SHARE = 0.9
"""Smallest share of a column's values that are of one JSON kind: text, number, boolean, list or object."""
_PLAIN = {"text": pa.string(), "boolean": pa.bool_()}


def infer(data: bytes, known: Mapping[str, pa.DataType], given: Collection[str], section: str) -> Inferred:
    """Infers columns and types of some lines; columns of nulls are texts, and so are times, since JSON has none.

    A line that is not JSON, or has a value of another kind than nearly all others, is ignored.

    :param known: types that are given; columns in `given` accept any value.
    :param section: the section of the spec with the file, for errors.
    :raises ValueError: if most lines are not JSON objects, or a column has values of several types.
    """
    lines = split_lines(data.removeprefix(BOM))
    found = Inferred(pa.schema([]), len(lines))
    rows: list[Object] = []
    for line in lines:
        try:
            rows.append(load(line))
        except BadLineError as error:
            found.note(str(error))
    if 2 * found.bad > len(lines):
        raise ValueError(f"not one JSON object per line: {found.first}")
    types = {name: known.get(name) for name in dict.fromkeys(itertools.chain.from_iterable(rows))}
    for name, kind in types.items():
        types[name] = kind or _type_of([row.get(name) for row in rows], name, section)
    found.schema = pa.schema(types)
    checked = [field for field in found.schema if field.name not in given]
    for row in rows:
        for field in checked:
            if wrong := misfit_of(row.get(field.name), field.type, exact=True):
                found.note(misfit(field.name, field.type, wrong, section))
                break
    return found


def _type_of(values: Iterable[Any], name: str, section: str) -> pa.DataType:
    """Returns the type of values of which nine out of ten are of one kind. :raises ValueError: if they are not."""
    known = [value for value in values if value is not None]
    kinds = Counter(map(_kind, known))
    if not kinds:
        return pa.string()
    ((kind, most),) = kinds.most_common(1)
    if most < USUAL_SHARE * len(known):
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise ValueError(f"a column has values of several types: {name} ({told}); {_way_out(name, section)}")
    usual = [value for value in known if _kind(value) == kind]
    if kind == "list":
        return pa.list_(_type_of(itertools.chain.from_iterable(usual), name, section))
    if kind == "object":
        inner = dict.fromkeys(key for value in usual for key in value)
        if not inner:
            raise ValueError(
                f"{name} holds only empty objects, which Parquet does not support; {_way_out(name, section)}"
            )
        return pa.struct(
            [(key, _type_of([value.get(key) for value in usual], f"{name}.{key}", section)) for key in inner]
        )
    return _number_type(usual, name, section) if kind == "number" else _PLAIN[kind]


def _number_type(values: Sequence[int | float], name: str, section: str) -> pa.DataType:
    whole = [value for value in values if isinstance(value, int)]
    if len(whole) == len(values):
        for kind in (pa.int64(), pa.uint64()):
            if not any(misfit_of(value, kind, exact=True) for value in (min(whole), max(whole))):
                return kind
    lost = [value for value in whole if misfit_of(value, pa.float64(), exact=True)]
    if len(lost) > (1 - USUAL_SHARE) * len(values):
        raise ValueError(
            f"{name} holds {lost[0]}, which no type of numbers holds exactly; {_way_out(name, section)}"
        )
    return pa.float64()


def _way_out(name: str, section: str) -> str:
    column = name.partition(".")[0]
    return f"write one type, or read the column as text with {section}.types: {{{column}: string}}"


def _kind(value: Any) -> str:
    """Returns the JSON kind of a value."""
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "text"
    return "list" if isinstance(value, list) else "object"
