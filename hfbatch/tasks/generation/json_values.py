"""Arrow types and values of texts that satisfy a constraint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import pyarrow as pa

from hfbatch.tasks.generation.constraint import ConstraintSpec

Column = tuple[pa.DataType, Callable[[Any], Any]]
"""An Arrow type, and what turns a JSON value other than null into a value of it."""
ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id", "x-guidance")
) | {"$defs", "definitions"}
"""Keywords that say nothing of the type."""
NULL = {"type": "null"}
MOST_FIELDS = 2000
"""Maximum number of types in a column's type, which references may multiply; a larger one is JSON."""
MOST_REFERENCES = 16
"""Maximum number of references that lead to each other."""


class _TooLarge(Exception):
    pass


class NumberOutOfRange(ValueError):
    """A number that the column's type cannot hold."""


def parser_of(constraint: ConstraintSpec | None) -> Column | None:
    """Returns type and parser of the column that holds texts as values; None if there is none."""
    if constraint is None or constraint.regex is not None:
        return None
    if constraint.choices is not None:
        return pa.string(), str
    schema = constraint.closed_schema
    try:
        kind, value_of = column_of(schema, schema, count(1))
    except _TooLarge:
        kind, value_of = JSON
    if value_of is _as_json:
        return kind, str  # the text as it is

    def parse(text: str) -> Any:
        """Returns the value of a text."""
        return _or_none(value_of)(json.loads(text))

    return kind, parse


def column_of(
    schema: Any, root: Mapping[str, Any], fields: Iterator[int], inside: tuple[str, ...] = ()
) -> Column:
    """Returns type and values of a schema: string with JSON where it leaves the type open.

    :param root: the schema that its references are relative to.
    :param fields: counts the types.
    :param inside: references on the way here, so that recursive ones end.
    """
    if next(fields) > MOST_FIELDS or len(inside) > MOST_REFERENCES:
        raise _TooLarge
    if not isinstance(schema, dict):
        return JSON
    said = {key: value for key, value in schema.items() if key not in ANNOTATIONS}
    match said:
        case {"$ref": str(name)} if len(said) == 1:
            return JSON if name in inside else column_of(_target(root, name), root, fields, (*inside, name))
        case {"anyOf": list(kinds)} | {"oneOf": list(kinds)} | {"allOf": list(kinds)} if len(said) == 1:
            kinds = [kind for kind in kinds if kind != NULL]
            return column_of(kinds[0], root, fields, inside) if len(kinds) == 1 else JSON
        case {"enum": list(values)}:
            return _scalar({type(value) for value in values})
        case {"const": value}:
            return _scalar({type(value)})
        case {"type": str() | list() as kind} if not {"$ref", "anyOf", "oneOf", "allOf"} & said.keys():
            several = kind if isinstance(kind, list) else [kind]
            types = {one for one in several if isinstance(one, str) and one != "null"}
            properties = said.get("properties")
            if types == {"array"} and "prefixItems" not in said:
                inner, value_of = column_of(said.get("items"), root, fields, inside)
                return pa.list_(inner), _list_of(_or_none(value_of))
            closed = said.get("additionalProperties") is False and "patternProperties" not in said
            if types == {"object"} and isinstance(properties, dict) and properties and closed:
                return _struct(
                    {name: column_of(one, root, fields, inside) for name, one in properties.items()}
                )
            return SCALARS.get(frozenset(types), JSON)
    return JSON


def _target(root: Mapping[str, Any], name: str) -> Any:
    """Returns what a reference such as #/$defs/Name refers to; None if it is of another form."""
    place: Any = root
    for key in name.removeprefix("#").split("/")[1:]:
        place = place.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place if name.startswith("#/") else None


def _scalar(types: set[type]) -> Column:
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return SCALARS.get(frozenset(names.get(kind, "") for kind in types - {type(None)}), JSON)


def _struct(columns: dict[str, Column]) -> Column:
    values = {name: _or_none(value_of) for name, (_, value_of) in columns.items()}
    return (
        pa.struct([(name, kind) for name, (kind, _) in columns.items()]),
        lambda found: {name: values[name](value) for name, value in found.items()},
    )


def _list_of(value_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda found: [value_of(value) for value in found]


def _or_none(value_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else value_of(value)


def _integer(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise NumberOutOfRange(f"the text holds the integer {value}, which int64 cannot hold")
    return value


def _number(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NumberOutOfRange("the text holds a number that float64 cannot hold")
    return number


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


JSON: Column = (pa.string(), _as_json)
SCALARS: Mapping[frozenset[str], Column] = {
    frozenset({"string"}): (pa.string(), str),
    frozenset({"boolean"}): (pa.bool_(), bool),
    frozenset({"integer"}): (pa.int64(), _integer),
    frozenset({"number"}): (pa.float64(), _number),
    frozenset({"integer", "number"}): (pa.float64(), _number),
}
