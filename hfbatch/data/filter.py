"""Evaluates `input.filter`, a SQL condition on a table's columns, with DuckDB. Reads no files.

A condition is checked in the tree of DuckDB's own parser, and the checked query is the one that runs. The result of
a row may depend only on that row: not on the clock, chance, settings or other rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from hfbatch.data.formats.columns import fields_of, storage_type
from hfbatch.errors import SplitError

_POSITION, _ROWS = "hfbatch_position", "hfbatch_rows"
_PLAIN = frozenset(
    ("BETWEEN", "CASE", "CAST", "COLLATE", "COMPARISON", "CONJUNCTION", "CONSTANT", "OPERATOR", "TYPE")
)
"""Classes of expressions that depend only on their operands."""
_OTHERS = {
    "SUBQUERY": "a subquery, as = ANY is (write IN or list_contains)",
    "WINDOW": "a window function",
    "STAR": "* or COLUMNS(...)",
    "PARAMETER": "a parameter",
    "POSITIONAL_REFERENCE": "a column by its number",
}
_BY_NAME = frozenset(("aggregate", "array_aggr", "array_aggregate", "list_aggr", "list_aggregate"))
"""Functions whose second argument names the function to call."""
_MISNAMED = frozenset(
    (
        "current_localtime", "current_localtimestamp", "current_time", "current_timestamp", "localtime",
        "localtimestamp", "reservoir_quantile",
    )
)  # fmt: skip
"""Functions that depend on the clock or on chance, but that DuckDB 2.0 lists as consistent or does not list."""


def matching_rows(table: pa.Table, condition: str, file: str, section: str) -> np.ndarray:
    """Returns the positions of the rows for which a condition is true, int64, ascending.

    :param file: file of the rows, for errors.
    :param section: section of the spec with the filter, for errors.
    :raises SplitError: if the condition is invalid, or fails on one of the rows.
    """
    columns, faults = _analyse(condition, table.schema)
    if faults:
        raise SplitError(faults[0].replace("input.filter", f"{section}.filter", 1))
    if not len(table):
        return np.zeros(0, np.int64)
    try:
        with _connect() as session:
            rows = session.from_arrow(_comparable(table.select(columns)))
            kept = rows.query(_ROWS, _query(condition)).fetchnumpy()[_POSITION]
    except duckdb.Error as error:
        raise SplitError(
            f"{section}.filter {condition!r} fails on rows of {file}: {_first_line(error)}"
        ) from error
    return np.sort(np.asarray(kept, np.int64))


def filter_columns(filter: str, schema: pa.Schema) -> list[str]:
    """Returns the columns that a condition reads, in the schema's order."""
    return list(_analyse(filter, schema)[0])


def filter_faults(filter: str, schema: pa.Schema) -> list[str]:
    """Checks a SQL condition on these columns; returns its faults, one sentence each."""
    columns, faults = _analyse(filter, schema)
    if faults:
        return list(faults)
    shown = f"input.filter {filter!r}"
    nulls = pa.table({name: pa.nulls(1, schema.field(name).type) for name in columns} or {_ROWS: [None]})
    try:
        with _connect() as session:
            session.from_arrow(_comparable(nulls[:0])).query(_ROWS, _query(filter)).fetchall()
            answers = session.from_arrow(_comparable(nulls)).project(f"({filter}\n)")
            (kind,) = answers.types
            with suppress(duckdb.InvalidInputException):  # functions that do not accept nulls, such as `map`
                answers.fetchall()  # evaluating one row finds constants that are not valid dates or numbers
    except duckdb.Error as error:
        return [_no_condition(filter, schema, _first_line(error))]
    if str(kind) != "BOOLEAN":
        return [
            f"{shown} is a {kind}, not true or false; compare it with something, such as {filter.strip()} = …"
        ]
    return []


@lru_cache(maxsize=32)
def _analyse(condition: str, schema: pa.Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the columns that a condition reads, and the faults in its tree."""
    try:
        reading = _Reading(condition, schema)
        reading.visit(_parse(condition))
    except RecursionError:
        return (), (f"input.filter {condition[:80]!r} is nested too deeply; write it with fewer levels",)
    except duckdb.Error as error:
        return (), (_no_condition(condition, schema, _first_line(error)),)
    columns = tuple(name for name in schema.names if name in reading.columns)
    return columns, tuple(dict.fromkeys([*reading.faults, *_confused(condition, schema, columns)]))


def _confused(condition: str, schema: pa.Schema, columns: Sequence[str]) -> Iterator[str]:
    """Yields faults of names that DuckDB does not distinguish, among the columns read and their fields."""
    groups = [("columns", list(columns))]
    groups += [
        (f"fields of column {name!r}", list(names)) for name in columns for names in _structs(schema, name)
    ]
    for what, names in groups:
        first: dict[str, str] = {}
        for name in names:
            if first.setdefault(_fold(name), name) != name:
                yield (
                    f"input.filter {condition!r} reads the {what} {first[_fold(name)]!r} and {name!r}, "
                    "which SQL does not distinguish; rename one of them in the files"
                )
    for name in {_POSITION, _ROWS} & {_fold(name) for name in columns}:
        yield f"input.filter {condition!r} reads {name!r}, a name that hfbatch uses itself; rename that column"


def _structs(schema: pa.Schema, column: str) -> Iterator[list[str]]:
    """Yields the field names of each struct in a column, at any depth."""
    waiting = [storage_type(schema.field(column).type)]
    while waiting:
        kind = waiting.pop()
        fields = fields_of(kind)
        waiting += [field.type for field in fields]
        if pa.types.is_struct(kind):
            yield [field.name for field in fields]


class _Reading:
    """Collects the columns and functions in the tree of a condition.

    :param parameters: names that are not columns: the parameters of a macro.
    :param within: macros that contain this one.
    """

    def __init__(
        self,
        condition: str,
        schema: pa.Schema,
        parameters: frozenset[str] = frozenset(),
        within: frozenset[str] = frozenset(),
    ) -> None:
        self.columns: set[str] = set()
        self.faults: list[str] = []
        self._condition, self._schema, self._within = condition, schema, within
        self._text = _query(condition).encode()
        self._parameters = parameters

    def visit(self, node: Any, own: frozenset[str] = frozenset()) -> None:
        """Visits a part of the tree. :param own: names defined by an enclosing lambda."""
        if isinstance(node, list):
            for item in node:
                self.visit(item, own)
            return
        if not isinstance(node, dict):
            return
        kind = node.get("class")
        if kind == "COLUMN_REF":
            self._name(node["column_names"][0], node, own)
        elif kind == "LAMBDA" and node.get("syntax_type") != "SINGLE_ARROW":  # JSON's `column -> path`
            self.visit(node["expr"], own | frozenset(_names(node["lhs"])))
        elif kind is None or kind in _PLAIN or kind in ("FUNCTION", "LAMBDA"):
            if kind == "FUNCTION":
                self._call(node, own)
            for item in node.values():
                self.visit(item, own)
        else:
            what = _OTHERS.get(kind, kind.lower())
            self._fault(
                f"is not a SQL condition on the input: it has {what}; use a condition on the columns of one row"
            )

    def _name(self, name: str, node: dict[str, Any], own: frozenset[str]) -> None:
        """Checks a name that should be that of a column."""
        if _fold(name) in own | self._parameters:
            return
        alike = [column for column in self._schema.names if _fold(column) == _fold(name)]
        quoted = self._text[node["query_location"] :][:1] == b'"'
        if len(alike) == 1:
            self.columns.add(alike[0])
        elif name in alike and quoted:
            self.columns.add(name)
        elif alike:
            choice = " or ".join(f'"{column}"' for column in alike)
            self._fault(
                f"names {name!r}, but there are columns that differ in case only; write {choice}, with the quotes"
            )
        elif _is_unstable(name, self._within):
            self._fault(_CALLS.format(name.lower()))
        else:
            known = ", ".join(self._schema.names)
            self._fault(f"names {name!r}, which is no column of the input (columns: {known})")

    def _call(self, node: dict[str, Any], own: frozenset[str]) -> None:
        """Checks a function, or a method of a column: `name.lower()`."""
        path = node.get("qualified_name", {}).get("path") or [
            *filter(None, [node.get("catalog"), node.get("schema")]),
            node["function_name"],
        ]
        name, arguments = path[-1].lower(), node.get("arguments") or node.get("children") or []
        if len(path) > 1:
            self._name(path[0], node, own)
        called = [name]
        if name in _BY_NAME:
            given = [text for argument in arguments for text in _texts(argument)]
            called += given or ["a function whose name is computed"]
            if not given:
                self._fault(f"calls {name} of {called[1]}; write that name as text")
        if (name == "age" and len(arguments) + len(path) == 2) or any(
            _is_unstable(one.lower(), self._within) for one in called
        ):
            self._fault(
                _CALLS.format(next((one for one in called if _is_unstable(one.lower(), self._within)), name))
            )

    def _fault(self, what: str) -> None:
        self.faults.append(f"input.filter {self._condition!r} {what}")


_CALLS = "calls {}, which gives another answer on each rerun; use a condition on columns"


def _names(node: Any) -> Iterator[str]:
    """Yields the names that a lambda defines, folded."""
    if isinstance(node, dict):
        if node.get("class") == "COLUMN_REF":
            yield _fold(node["column_names"][0])
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from _names(item)


def _is_unstable(name: str, within: frozenset[str] = frozenset()) -> bool:
    """Returns whether a function's result depends on more than its arguments."""
    name = name.lower()
    if name in within:
        return False  # a recursive macro is checked by the caller
    kinds = _functions().get(name, ())
    return name in _MISNAMED or any(
        stability != "CONSISTENT"
        if definition is None
        else _depends(definition, tuple(parameters), within | {name})
        for stability, definition, parameters in kinds
    )


@lru_cache
def _depends(macro: str, parameters: tuple[str, ...], within: frozenset[str]) -> bool:
    """Returns whether the expansion of a macro depends on more than its parameters."""
    reading = _Reading(macro, pa.schema([]), frozenset(map(_fold, parameters)), within)
    reading.visit(_parse(macro))
    return bool(reading.faults)


@lru_cache
def _functions() -> dict[str, list[tuple[str, str | None, list[str]]]]:
    """Returns scalar functions and macros by name: stability, definition and parameters of each overload."""
    found: dict[str, list[tuple[str, str | None, list[str]]]] = {}
    with _connect() as session:
        rows = session.execute(
            "SELECT lower(function_name), stability, macro_definition, parameters FROM duckdb_functions() "
            "WHERE function_type IN ('scalar', 'macro')"
        ).fetchall()
    for name, *form in rows:
        found.setdefault(name, []).append(tuple(form))
    return found


def _parse(condition: str) -> Any:
    """Parses a condition to a tree. :raises duckdb.Error: if it is not exactly one condition."""
    tree, pattern = _tree(_query(condition)), _tree(_query("true"))
    where = tree.pop("where_clause", None)
    del pattern["where_clause"]
    if tree != pattern:
        raise duckdb.ParserException("it holds more than a condition")
    return where


def _tree(query: str) -> dict[str, Any]:
    with _connect() as session:
        (text,) = session.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
    found = json.loads(text)
    if found["error"]:
        raise duckdb.ParserException(found["error_message"])
    if len(found["statements"]) != 1:
        raise duckdb.ParserException("it holds more than a condition")
    node: dict[str, Any] = found["statements"][0]["node"]
    return node


def _query(condition: str) -> str:
    return f"SELECT {_POSITION} FROM {_ROWS} WHERE ({condition}\n)"  # noqa: S608 - its tree is checked before it runs


def _comparable(table: pa.Table) -> pa.Table:
    """Returns a table for DuckDB, with the position of each row: half floats and long decimals in supported types."""
    for at, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_float16(kind):
            table = table.set_column(at, field.name, table[at].cast(pa.float32()))
        elif pa.types.is_decimal256(kind) and kind.precision <= 38:
            table = table.set_column(
                at, field.name, table[at].cast(pa.decimal128(kind.precision, kind.scale))
            )
    return table.append_column(_POSITION, pa.array(np.arange(len(table))))


def _connect() -> Any:
    """Opens a session of this process's one database; opening a new database takes as long as a small split."""
    return _database().cursor()


@lru_cache
def _database() -> Any:
    """Opens a database in memory without access to files and to this process's variables, and with time zone UTC.

    Otherwise times without a zone, and dates of times with one, would depend on the node's time zone.
    """
    config: dict[str, Any] = {
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "threads": 1,
    }
    database = duckdb.connect(":memory:", config=config)
    database.execute("SET GLOBAL TimeZone = 'UTC'")
    database.execute("SET GLOBAL Calendar = 'gregorian'")
    return database


def _fold(name: str) -> str:
    """Folds a name as DuckDB compares it: ASCII letters in lower case."""
    return name.encode("utf8", "surrogatepass").lower().decode("utf8", "surrogatepass")


def _no_condition(condition: str, schema: pa.Schema, reason: str) -> str:
    known = ", ".join(schema.names)
    return f"input.filter {condition!r} is not a SQL condition on the input: {reason} (columns: {known})"


def _texts(argument: dict[str, Any]) -> list[str]:
    """Returns the text of an argument that is a text constant."""
    node = argument.get("expression", argument)
    literal = node.get("literal") or {}
    return [literal["text"]] if literal.get("kind") == "STRING" else []


def _first_line(error: duckdb.Error) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
