"""A column that templates render from the other columns of a split, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from jinja2 import StrictUndefined

from hfbatch.data.formats.base import BadRow
from hfbatch.data.formats.columns import convert, storage_type
from hfbatch.data.templates import Null, NullInput, compile_template
from hfbatch.errors import SplitError, redact_text

MOST_CHARACTERS = 1 << 30
"""Maximum of characters of the texts of a split."""


@dataclass(frozen=True)
class RenderedColumn:
    """A column and its templates."""

    name: str
    template: Any
    """A template, or lists and dicts of templates: the value of a row with a template for each text."""
    kind: pa.DataType
    """The type of the values."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the templates read. :raises jinja2.TemplateSyntaxError: for a template with an error."""
        return frozenset(
            name for source in _sources(self.template) for name in compile_template(source).columns
        )


def render_column(
    column: RenderedColumn, table: pa.Table, skip: Collection[int]
) -> tuple[pa.Array, list[BadRow]]:
    """Renders a column.

    :param skip: positions of rows that cannot be read, for which it is null.
    :returns: the values, and the rows on which a template fails; these are null.
    :raises SplitError: if the texts are too large together.
    """
    names = sorted(column.columns)
    given = [_values(table[name], name) for name in names]
    rows = zip(*given, strict=True) if given else iter([()] * len(table))
    render, made, bad, size = _renderer(column.template), [], [], 0
    for position, row in enumerate(rows):
        value = None
        if position not in skip:
            try:
                value = render(dict(zip(names, row, strict=True)))
            except Exception as error:  # noqa: BLE001 - any error of a row is its reject reason
                message = redact_text(str(error) or repr(error))
                bad.append(BadRow(position, type(error).__name__, message, stage="preprocess"))
        size += sum(map(len, _sources(value)))
        if size > MOST_CHARACTERS:
            raise SplitError(
                f"its rendered texts have more than {MOST_CHARACTERS:,} characters; lower input.split_rows"
            )
        made.append(value)
    return pa.array(made, column.kind), bad


def _sources(value: Any) -> Iterator[str]:
    """Yields the texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _sources(one)


def _renderer(template: Any) -> Callable[[dict[str, Any]], Any]:
    """Returns a function that renders the templates in a value, given a row."""
    if isinstance(template, str):
        return compile_template(template).render
    if isinstance(template, dict):
        fields = {name: _renderer(one) for name, one in template.items()}
        return lambda row: {name: render(row) for name, render in fields.items()}
    items = [_renderer(one) for one in template]
    return lambda row: [render(row) for render in items]


def _values(column: pa.ChunkedArray, name: str) -> list[Any]:
    """Returns the values of a column for templates: nulls at any depth name their column."""
    column = convert(column, storage_type(column.type))
    kind = column.type
    if (pa.types.is_timestamp(kind) or pa.types.is_duration(kind)) and kind.unit == "ns":
        coarse = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else pa.duration("us")
        column = column.cast(coarse, safe=False)  # Python's dates end at microseconds
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError, LookupError):  # such as a date after the year 9999
        values = [_value(one, name) for one in column]
    if pa.types.is_nested(kind):
        return [_without_none(value, name) for value in values]
    null = _null(name)
    return [null if value is None else value for value in values] if column.null_count else values


def _value(scalar: pa.Scalar, name: str) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, LookupError) as error:
        return StrictUndefined(hint=f"column {name} has no value in Python: {error}")


def _without_none(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_none(one, f"an item of {name}") for one in value]
    return _null(name) if value is None else value


def _null(name: str) -> Null:
    return Null(hint=f"column {name} is null", exc=NullInput)
