"""Templates over the columns of a row: what they print, which rows they reject, and that no row makes them run on."""

from __future__ import annotations

import time
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import jinja2
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.data import rendering
from hfbatch.data.rendering import RenderedColumn, render_column
from hfbatch.data.templates import compile_template
from hfbatch.errors import SplitError

ODD = st.sampled_from(
    ["{{ title }}", "{% for x in y %}", "{#", "}}", "{{", "\\", "\n", "\r\n", "{% raw %}", "<&>'\""]
)
VALUES = st.lists(ODD | st.text(st.characters(exclude_categories=["Cs"])), max_size=6).map("".join)


def rendered(
    template: Any, table: dict[str, Any], kind: pa.DataType | None = None
) -> tuple[list[Any], dict[int, str]]:
    """The values of the rows, and why rows have none."""
    column = RenderedColumn("made", template, kind or pa.string())
    made, bad = render_column(column, pa.table(table), ())
    assert {row.stage for row in bad} <= {"preprocess"}
    return made.to_pylist(), {row.position: f"{row.error}: {row.message}" for row in bad}


def fault(source: str) -> tuple[int, str]:
    with pytest.raises(jinja2.TemplateSyntaxError) as caught:
        compile_template(source)
    return caught.value.lineno, str(caught.value.message)


@given(title=VALUES, body=VALUES)
def test_a_value_is_never_read_as_a_template(title: str, body: str) -> None:
    made = compile_template("Title: {{ title }}\n{{ body }}.").render({"title": title, "body": body})
    assert made == f"Title: {title}\n{body}."


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pa.int64(), -3, "-3"),
        (pa.float64(), 3.5, "3.5"),
        (pa.bool_(), True, "True"),
        (pa.decimal128(5, 2), Decimal("3.50"), "3.50"),
        (pa.date32(), date(2024, 2, 29), "2024-02-29"),
        (pa.timestamp("ns"), datetime(2024, 2, 29, 12, 30), "2024-02-29 12:30:00"),
        (pa.timestamp("ms", "UTC"), datetime(2024, 2, 29), "2024-02-29 00:00:00+00:00"),
        (pa.duration("ns"), timedelta(minutes=3), "0:03:00"),
        (pa.dictionary(pa.int8(), pa.string()), "a", "a"),
        (pa.json_(), '{"a": 1}', '{"a": 1}'),
        (pa.list_(pa.string()), ["a", None, 'ü"'], '["a", null, "ü\\""]'),
        (pa.struct({"a": pa.date32(), "b": pa.list_(pa.int8())}), {"a": date(2024, 1, 2), "b": [1]}, '{"a": "2024-01-02", "b": [1]}'),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_any_type_is_printed(kind: pa.DataType, value: Any, text: str) -> None:
    array = (
        pa.array([value, None], kind)
        if kind != pa.json_()
        else pa.ExtensionArray.from_storage(kind, pa.array([value, None]))
    )
    assert rendered("{{ x }}", {"x": array}) == ([text, None], {1: "NullInput: column x is null"})


@pytest.mark.parametrize(
    "source",
    [
        "{% for tag in tags if tag != 'b' %}{{ loop.index }}. {{ tag|upper }}{{ ', ' if not loop.last }}{% endfor %}",
        "{% if n > 2 and who.name is defined %}\n{{ who.name.title() }}: {{ tags|join('; ') }}\n{% endif %}\nEnd",
        "{% set total = n * 2 + 1 %}{{ total }} {{ '%05.2f'|format(n / 7) }} {{ day.strftime('%d %B %Y') }}",
        "{{ tags|map('upper')|sort(reverse=true)|join }} {{ who['name'][:3]|replace('a', '<a>') }} {{ who.age|default(7) }}",
        "{% for key, value in who.items() %}{{ key }}={{ value }} {% endfor %}{% raw %}{{ n }}{% endraw %}{# n #}",
    ],
)
def test_what_jinja_gives(source: str) -> None:
    row = {"tags": ["a", "b", "c"], "n": 3, "who": {"name": "ada l", "age": 36}, "day": date(2024, 2, 29)}
    expected = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render(row)
    assert rendered(source, {name: [value] for name, value in row.items()}) == ([expected], {})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if x %}{{ x }}{% else %}none{% endif %}", "none"),
        ("{{ x|default('none') }}", "none"),
        ("{{ 'none' if x is none else x }}", "none"),
        ("{{ x == none }}", "True"),
        ("{{ x or 'none' }}", "none"),
        ("{{ x|tojson }}", "null"),
        *((source, None) for source in ("{{ x }}", "{{ x|upper }}", "{{ x|trim }}", "{{ x|join }}", "{{ x.strip() }}")),
        *((source, None) for source in ("{{ x.y }}", "{{ x > 3 }}", "{% for y in x %}{% endfor %}", "{{ x|map('upper')|join }}")),
    ],
)  # fmt: skip
def test_a_null_is_false_and_has_a_default_and_rejects_the_row_otherwise(
    source: str, text: str | None
) -> None:
    bad = {} if text else {0: "NullInput: column x is null"}
    assert rendered(source, {"x": pa.array([None], pa.string())}) == ([text], bad)


def test_a_null_inside_a_value_is_named() -> None:
    rows = [{"name": None, "tags": ["a", None]}, {"name": "b", "tags": ["c"]}]
    found = rendered("{{ who.name|upper }}", {"who": rows})
    assert found == ([None, "B"], {0: "NullInput: column who.name is null"})
    assert rendered("{{ who.tags|join }}", {"who": rows})[1] == {
        0: "NullInput: column an item of who.tags is null"
    }
    assert rendered("{{ who.tags|select|join }}", {"who": rows}) == (["a", "c"], {})


def test_a_row_that_fails_is_rejected_alone() -> None:
    years = pa.array([2**40, 0, 1], pa.timestamp("s"))
    made, bad = rendered("{{ 6 // n }} {{ at.strftime('%Y') }}", {"n": [1, 0, 3], "at": years})
    assert made == [None, None, "2 1970"]
    assert bad[0].startswith("UndefinedError: column at has no value in Python")
    assert bad[1].startswith("ZeroDivisionError")
    assert "TypeError: * takes numbers, not str" in rendered("{{ s * 2 }}", {"s": ["a"]})[1][0]
    assert "has no attribute 'y'" in rendered("{{ s.y }}", {"s": [{"x": 1}]})[1][0]
    assert "TypeError: a bytes cannot be printed" in rendered("{{ s.x }}", {"s": [{"x": b"1"}]})[1][0]
    assert "surrogates not allowed" in rendered("{{ '\\ud800' }}", {"s": [1]})[1][0]


def test_messages_are_rendered_text_by_text() -> None:
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    chat = [{"role": "system", "content": "Short."}, {"role": "user", "content": "{{ a }}?"}]
    made, bad = rendered(chat, {"a": ["{{ b }}", None]}, kind)
    assert made == [[{"role": "system", "content": "Short."}, {"role": "user", "content": "{{ b }}?"}], None]
    assert list(bad) == [1]
    assert rendered("No column.", {"a": [1, 2]}) == (["No column."] * 2, {})


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("a\n{% if x %}", 2, "end of template"),
        ("a\n\n{{ x|random }}", 3, "No filter named 'random'"),
        ("{{ range(9) }}", 1, "only these methods can be called"),
        ("{{ x.format_map(y) }}", 1, "only these methods can be called"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}", 1, "macro is not allowed"),
        ("\n{% include 'a' %}", 2, "include is not allowed"),
        ("{% set y %}{{ x }}{% endset %}", 1, "assignblock is not allowed"),
        ("{{ x ~ x }}", 1, "write {{ a }}{{ b }}"),
        ("{{ [x, x] }}", 1, "constants only"),
        ("{{ 9 ** 9 ** 9 }}", 1, "pow is not allowed"),
        ("{{ " + "(" * 5000 + "x" + ")" * 5000 + " }}", 1, "nested too deeply"),
        ("{% for y in x %}" * 25 + "{% endfor %}" * 25, 1, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_allowed_is_an_error_with_its_line(source: str, line: int, message: str) -> None:
    found = fault(source)
    assert found[0] == line
    assert message in found[1]


HOSTILE = [
    ("{% for a in x %}" * 9 + "{% endfor %}" * 9, "steps"),
    ("{% for a in x %}{% for b in x %}{{ s }}{% endfor %}{% endfor %}", "characters"),
    ("{{ x|join(x|join(x|join(s))) }}", "characters"),
    ("{{ s|replace('', s) }}", "characters"),
    ("{{ s.split(',')|map('replace', 'a', s)|list|length }}", "characters"),
    ("{% set y = s %}" + "{% set y = '%s%s'|format(y, y) %}" * 60 + "{{ y }}", "characters"),
    ("{% set y = s %}" + "{% set y = y|tojson %}" * 60 + "{{ y }}", "characters"),
    ("{% set y = n * n %}" + "{% set y = y * y %}" * 60 + "{{ y }}", "bits"),
    ("{{ '%999999999d'|format(n) }}", "width"),
    ("{{ '%*d'|format(n, n) }}", "width"),
    ("{{ s * n }}", "takes numbers"),
    ("{{ s % n }}", "takes numbers"),
]


@pytest.mark.parametrize(("source", "message"), HOSTILE, ids=[source[:30] for source, _ in HOSTILE])
def test_a_template_stops_on_rows_that_would_make_it_run_on(source: str, message: str) -> None:
    row = {"x": [["a"] * 1000], "s": ['a,"' * 10_000], "n": [2**62]}
    begun = time.process_time()
    made, bad = rendered(source, row)
    assert made == [None]
    assert message in bad[0]
    assert time.process_time() - begun < 5


def test_a_split_with_too_much_text_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_CHARACTERS", 100)
    with pytest.raises(SplitError, match="more than 100 characters; lower"):
        rendered("{{ x }}", {"x": ["a" * 60] * 2})
