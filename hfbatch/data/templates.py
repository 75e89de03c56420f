"""Templates of a spec over the columns of a row, in a part of Jinja whose rendering is bounded.

A template has no loader, so that it includes nothing, and rows are only ever its values. What could make a small template
or a hostile row fill the memory or run for ever is refused when the template is compiled (macros, lists of columns, calls
of other methods) or limited per row (steps of loops, characters of a text). Nothing in it depends on time or chance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from typing import Any

import jinja2
from jinja2 import Template, TemplateSyntaxError, nodes, pass_context
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_CHARACTERS = 1 << 22
"""Maximum of characters that a template, or one of its filters, writes for a row."""
MOST_STEPS = 100_000
"""Maximum of steps of all loops of a template for a row."""
MOST_BITS = 256
"""Maximum size of a computed integer."""
BUDGET = "budget of the row"
"""The variable that counts; a template cannot name it."""
STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign)
EXPRESSIONS = (
    nodes.Name, nodes.Const, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg,
    nodes.Pos, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Getattr, nodes.Getitem,
    nodes.Slice, nodes.Filter, nodes.Test, nodes.Keyword,
)  # fmt: skip
NUMBERS = (int, float, Decimal)
METHODS = (
    *("capitalize", "endswith", "get", "isoformat", "items", "keys", "lower", "lstrip", "removeprefix", "removesuffix"),
    *("rstrip", "split", "splitlines", "startswith", "strftime", "strip", "title", "total_seconds", "upper", "values"),
)  # fmt: skip
"""Methods that a template may call."""
PLAIN_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "last", "length", "list"),
    *("lower", "max", "min", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "sort", "sum"),
    *("title", "trim", "truncate", "unique", "upper", "wordcount"),
)  # fmt: skip
"""Filters of Jinja whose results are about as large as their values."""


class NullInput(jinja2.UndefinedError):
    """A template uses a null for which it has no default."""


class Null(jinja2.StrictUndefined):
    """A null of a row: false, equal to none and not defined, and empty for `select`; any other use raises an error."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:  # type: ignore[override]
        return not self == other


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which operators compute numbers only."""

    intercepted_binops = frozenset(("+", "*", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes an operator. :raises TypeError: for other values than numbers. :raises OverflowError: for huge integers."""
        for value in (left, right):
            if not isinstance(value, NUMBERS):
                kind = value if isinstance(value, jinja2.Undefined) else type(value).__name__
                raise TypeError(
                    f"{operator} takes numbers, not {kind}; write {{{{ a }}}}{{{{ b }}}} to join texts"
                )
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > MOST_BITS:
            raise OverflowError(f"a number has more than {MOST_BITS} bits")
        return made


def as_text(value: Any) -> str:
    """Returns how a template prints a value: lists and structs as JSON. :raises TypeError: for bytes, methods and the like."""
    if isinstance(value, str):
        return value
    if isinstance(value, jinja2.Undefined | bool | int | float | Decimal | date | time | timedelta):
        return str(value)
    if isinstance(value, list | tuple | dict):
        return as_json(value)
    if value is None:
        raise NullInput("a value is none")
    raise TypeError(f"a {type(value).__name__} cannot be printed; use a filter such as join")


def as_json(value: Any) -> str:
    """Returns a value as JSON, with null for nulls, and texts for dates and the like."""
    made = json.dumps(
        value, ensure_ascii=False, default=lambda one: None if isinstance(one, Null) else as_text(one)
    )
    _limited(len(made))  # each call may double the backslashes
    return made


def _limited(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise ValueError(f"the template writes more than {MOST_CHARACTERS:,} characters")


class _Budget:
    """Counts the steps and the characters of a row."""

    def __init__(self) -> None:
        self.steps = self.characters = 0

    def step(self) -> None:
        """Counts a step. :raises ValueError: beyond the maximum."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ValueError(f"the loops of the template take more than {MOST_STEPS:,} steps")

    def write(self, text: Any) -> None:
        """Counts the characters of a text. :raises ValueError: beyond the maximum."""
        self.characters += len(text) if isinstance(text, str) else 0
        _limited(self.characters)


@pass_context
def _counted(context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """Yields the values of a loop."""
    budget = context[BUDGET]
    for value in values:
        budget.step()
        yield value


@pass_context
def _map(context: Context, values: Iterable[Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    budget = context[BUDGET]
    for value in FILTERS["map"](context, iter(values), *arguments, **options):
        budget.write(value)
        yield value


def _join(values: Iterable[Any], separator: Any = "") -> str:
    texts, between = [as_text(value) for value in values], as_text(separator)
    _limited(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def _replace(value: Any, old: Any, new: Any) -> str:
    text, old, new = as_text(value), as_text(old), as_text(new)
    _limited(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _format(pattern: str, *values: Any) -> str:
    if re.search(r"%[^%a-zA-Z]*(\*|\d{3})", pattern):
        raise ValueError(f"format {pattern!r} has a width of * or above 99; write a smaller number")
    shown = tuple(value if isinstance(value, NUMBERS) else as_text(value) for value in values)
    _limited(len(pattern) + sum(len(value) for value in shown if isinstance(value, str)))
    return pattern % shown


@cache
def _environment() -> _Environment:
    made = _Environment(
        undefined=jinja2.StrictUndefined, finalize=as_text, trim_blocks=True, lstrip_blocks=True
    )
    made.globals = {}
    made.filters = {name: FILTERS[name] for name in PLAIN_FILTERS} | {
        "counted": _counted, "format": _format, "join": _join, "map": _map, "replace": _replace, "string": as_text,
        "tojson": as_json,
    }  # fmt: skip
    made.tests["none"] = lambda value: value is None or isinstance(value, Null)
    return made


@dataclass(frozen=True)
class Compiled:
    """A compiled template."""

    columns: frozenset[str]
    """The variables that it reads."""
    template: Template

    def render(self, values: dict[str, Any]) -> str:
        """Returns the text for the values of a row. :raises Exception: of any kind, for a row on which it fails."""
        budget, chunks = _Budget(), []
        for chunk in self.template.generate({**values, BUDGET: budget}):
            budget.write(chunk)
            chunks.append(chunk)
        text = "".join(chunks)
        text.encode()  # a template can write lone surrogates, which Arrow cannot hold
        return text


@lru_cache(maxsize=64)
def compile_template(source: str) -> Compiled:
    """Compiles a template. :raises jinja2.TemplateSyntaxError: with the line, also for what is not allowed."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        for node in tree.find_all(nodes.Node):
            _check(node)
        columns = find_undeclared_variables(tree)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return Compiled(frozenset(columns), environment.from_string(tree))
    except TemplateSyntaxError:
        raise
    except (SyntaxError, RecursionError, MemoryError) as error:  # of Python, for the code that Jinja writes
        raise TemplateSyntaxError("it is nested too deeply", 1) from error


def _check(node: nodes.Node) -> None:
    """Checks a node of a template. :raises jinja2.TemplateSyntaxError: for one that is not allowed."""
    match node:
        case nodes.Call(node=nodes.Getattr(attr=name), dyn_args=None, dyn_kwargs=None) if name in METHODS:
            return
        case nodes.Call():
            fault = f"only these methods can be called: {', '.join(METHODS)}"
        case nodes.List() | nodes.Tuple(ctx="load"):
            if all(isinstance(item, nodes.Const) for item in node.items):
                return
            fault = "a list in a template holds constants only"
        case nodes.Concat():
            fault = "~ is not allowed; write {{ a }}{{ b }} to join texts"
        case nodes.Tuple():
            return
        case _ if isinstance(node, (*STATEMENTS, *EXPRESSIONS)):
            return
        case _:
            fault = f"{type(node).__name__.lower()} is not allowed in a template of rows"
    raise TemplateSyntaxError(fault, node.lineno or 1)
