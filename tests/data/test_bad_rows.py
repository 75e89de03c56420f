"""A line or value of a text file that cannot be read is a bad row with its reason; types lose nothing of a value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfbatch.data.formats import jsonl, sampling
from hfbatch.data.formats.base import Wanted
from hfbatch.data.reader import Rows
from hfbatch.data.source import open_source
from hfbatch.errors import SpecError
from hfbatch.spec.job import InputSpec
from tests.data.inputs import read_all, source_of

quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = [b'{"id": %d, "text": "row %d"}' % (number, number) for number in range(12)]


KEPT = {"id": "int64", "text": "string"}
"""As of an earlier run, so that one value among a few does not change them."""


def read(path: Path, split_rows: int = 4, kept: Mapping[str, Any] | None = None, **options: object) -> Rows:
    source = open_source(InputSpec.model_validate({"path": str(path), **options}), kept)
    rows = read_all(source, source.cut(split_rows))
    assert rows.places["row"].to_pylist() == list(range(len(rows.table)))
    return rows


def read_lines(folder: Path, lines: Sequence[bytes], **options: object) -> Rows:
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rows = read(folder / "a.jsonl", **options)
    assert len(rows.table) == len(lines)
    return rows


BAD_LINES = [
    (b"null", "NotJSON", "the line holds null, not a JSON object"),
    (b"[1, 2]", "NotJSON", "the line holds a list"),
    (b'"text"', "NotJSON", "the line holds the text 'text'"),
    (b"{", "NotJSON", "not JSON: .* at character 2"),
    (b'{"id": 1,}', "NotJSON", "not JSON"),
    (b'{"id": 01}', "NotJSON", "not JSON"),
    (b'{"id": 1} x', "NotJSON", "not JSON: Extra data"),
    (b'{"id": 1}{"id": 2}', "NotJSON", "not JSON: Extra data"),
    (b'{"text": "\x01"}', "NotJSON", "not JSON: Invalid control character"),
    (b"\0" * 50, "NotJSON", "NUL bytes"),
    (b'{"id": 1}\0{"id": 2}', "NotJSON", "NUL bytes"),
    (b"\x80\xff\xfe\x01{[", "NotJSON", "not JSON"),
    (
        b'{"text": "\\ud800"}',
        "LoneSurrogate",
        r"half of a surrogate pair, such as \\ud800.*write the whole pair",
    ),
    (b'{"other": "\\udc00 and \\ud83d\\ude00"}', "LoneSurrogate", "half of a surrogate pair"),
    (
        b'{"text": "caf\xe9"}',
        "NotUTF8",
        "column 'text' holds bytes that are not UTF-8; save the file as UTF-8",
    ),
    (b"[" * 200_000, "TooDeep", "nested 200,000 levels deep; at most 128"),
    (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "TooDeep", "nested 200,000 levels deep"),
    (b'{"a": "' + b"]" * 30_000 + b'", "b": ' + b"[" * 20_000, "TooDeep", "nested 20,001 levels deep"),
    (b'{"id": 1, "id": 2}', "RepeatedKey", "the key 'id' twice"),
    (
        b'{"id": 9223372036854775808}',
        "Misfit",
        r"column 'id' is int64, but the row has the number 9223372036854775808",
    ),
    (b'{"id": ' + b"9" * 5000 + b"}", "NumberTooLarge", "larger than a double"),
    (b'{"id": 1e400}', "NumberTooLarge", "the number 1e400 is larger than a double can hold"),
    (b'{"id": 1.5}', "Misfit", "the number 1.5"),
    (b'{"id": NaN}', "Misfit", "the number nan"),
    (b'{"id": true}', "Misfit", "has true"),
    (
        b'{"id": "one"}',
        "Misfit",
        r"has the text 'one'; fix the row, or give the type in input\.types.*\{id: string\}",
    ),
    (b'{"text": 5}', "Misfit", r"column 'text' is string, but the row has the number 5; .*\{text: string\}"),
    (b'{"text": {"a": 1}}', "Misfit", "has an object"),
]


@pytest.mark.parametrize(
    ("line", "error", "reason"), BAD_LINES, ids=[str(line[:24]) for line, _, _ in BAD_LINES]
)
@pytest.mark.parametrize("at", [0, 7])
def test_a_bad_line_is_one_bad_row_and_all_others_are_read(tmp_path, line, error, reason, at):
    rows = read_lines(tmp_path, [*GOOD[:at], line, *GOOD[at:]], kept=KEPT)
    expected = [json.loads(good) for good in GOOD]
    assert rows.table.to_pylist() == [*expected[:at], {"id": None, "text": None}, *expected[at:]]
    (bad,) = rows.bad
    assert (bad.position, bad.error) == (at, error)
    assert re.search(reason, bad.message)
    shown = line.decode("utf8", "backslashreplace")
    assert bad.line == shown if len(shown) < 10_000 else len(bad.line) == 10_000


@pytest.mark.parametrize(
    "line",
    [
        b'\xef\xbb\xbf{"id": 5, "text": "a"}',
        b' \t{"id": 5, "text": "a"} \r',
        b'{"text": "a", "id": 5, "deep": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"text": "a", "id": 5, "brackets": "' + b"[{" * 5000 + b'"}',
        b'{"text": "a", "id": 5, "many": [' + b"[]," * 300 + b"[]]}",
    ],
    ids=["bom", "spaces", "100 levels", "in a text", "side by side"],
)
def test_an_unusual_line_is_a_row(tmp_path, line):
    rows = read_lines(tmp_path, [*GOOD, line])
    assert rows.bad == []
    assert rows.table.select(["id", "text"]).to_pylist()[-1] == {"id": 5, "text": "a"}


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    rows = read_lines(tmp_path, [*GOOD, b'{"text": "\\ud83d\\ude00"}', b"null"])
    assert rows.table["text"].to_pylist()[-2:] == ["\U0001f600", None]


def test_bytes_that_are_not_utf8_matter_only_in_columns_that_are_read(tmp_path):
    data = b'{"id": 1, "other": "\xff"}\n{"id": "x", "other": "\xff"}\n'
    found = jsonl.parse(data, Wanted(pa.schema([("id", pa.int64())])))
    assert found.table["id"].to_pylist() == [1, None]
    assert [bad.position for bad in found.bad] == [1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
json_lines = st.one_of(
    st.dictionaries(st.sampled_from(["id", "text", "x"]), json_values, max_size=3)
    .map(json.dumps)
    .map(str.encode),
    st.binary(min_size=1, max_size=12).filter(lambda data: b"\n" not in data and data.strip(b" \t\r")),
    st.sampled_from([line for line, _, _ in BAD_LINES if len(line) < 100]),
)


@quick
@given(st.lists(json_lines, max_size=8), st.booleans())
def test_any_lines_give_one_row_each_and_good_ones_keep_their_values(lines, whole):
    wanted = Wanted(pa.schema([("id", pa.int64()), ("text", pa.string())]), whole=whole)
    found = jsonl.parse(b"\n".join([*GOOD, *lines]), wanted)
    assert found.table.slice(0, len(GOOD)).to_pylist() == [json.loads(line) for line in GOOD]
    assert len(found.table) == len(GOOD) + len(lines)
    bad = {row.position for row in found.bad}
    for position, line in enumerate(lines, len(GOOD)):
        if position not in bad:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf8", "replace"))
            row = found.table.slice(position, 1).to_pylist()[0]
            assert row == {"id": value.get("id"), "text": value.get("text")}


def test_many_bad_lines_are_distinguished_quickly(tmp_path):
    lines = [
        b'{"id": {"x": %d}, "text": 1}' % n if n % 2 else b'{"id": %d, "text": "a"}' % n for n in range(8000)
    ]
    wanted = Wanted(pa.schema([("id", pa.int64()), ("text", pa.string())]))
    found = jsonl.parse(b"\n".join(lines), wanted)
    assert [bad.position for bad in found.bad] == list(range(1, 8000, 2))
    assert found.table["id"].to_pylist() == [None if n % 2 else n for n in range(8000)]


def test_bad_rows_stay_whatever_the_filter_says(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD[:3], b"null", *GOOD[3:6], b"{"]))
    source = source_of(tmp_path)
    rows = read_all(source, source.cut(100), "id % 2 = 0")
    assert rows.places["row"].to_pylist() == [0, 2, 3, 5, 7]
    assert [bad.position for bad in rows.bad] == [2, 4]
    assert rows.read == 8


def test_the_plan_reports_bad_lines_in_the_sample(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD, b"null", b'{"id": "x"}']))
    (note,) = source_of(tmp_path).notes
    assert note.startswith("2 of 14 sampled rows cannot be read and will be rejects; the first, in a.jsonl: ")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'[\n{"a": 1},\n{"a": 2}\n]\n', r"a\.jsonl: not one JSON object per line"),
        ('{"a": 1}\n'.encode("utf-16"), r"a\.jsonl: it is UTF-16; save it as UTF-8"),
        (b'{"n": 1}\n{"n": "x"}\n', r"several types: n \(1 number, 1 text\); .*input\.types: \{n: string\}"),
        (b'{"n": [1, "x"]}\n', r"several types: n \(1 number, 1 text\)"),
        (
            b'{"n": -9223372036854775809}\n',
            r"-9223372036854775809, which no type of numbers holds exactly.*\{n: string\}",
        ),
        (b'{"n": 12345678901234567891}\n{"n": 0.5}\n', r"12345678901234567891, which no type"),
        (b'{"n": {}}\n', r"only empty objects, which Parquet does not support; .*\{n: string\}"),
    ],
)
def test_what_no_type_fits_is_a_fault_that_names_the_way_out(tmp_path, data, fault):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(SpecError, match=fault):
        source_of(tmp_path)


def test_a_type_in_the_spec_takes_json_values_as_they_are_written(tmp_path):
    values = [b"1", b'"x"', b"1.10", b"-12345678901234567890", b"true", b'{"a": [1, 2.5]}', b"null", b"1e5"]
    rows = read_lines(tmp_path, [b'{"n": %b, "day": "2024-01-0%d"}' % (v, at + 1) for at, v in enumerate(values)],
                      types={"n": "string", "day": "date32"})  # fmt: skip
    assert rows.bad == []
    assert rows.table["n"].to_pylist() == [
        "1", "x", "1.10", "-12345678901234567890", "true", '{"a": [1, 2.5]}', None, "1e5",
    ]  # fmt: skip
    assert rows.table["day"].type == pa.date32()
    rows = read_lines(tmp_path, [b'{"day": "2024-01-01"}', b'{"day": "soon"}'], types={"day": "date32"})
    assert [(bad.position, bad.error) for bad in rows.bad] == [(1, "Misfit")]


def test_whole_numbers_are_read_exactly_or_not_at_all(tmp_path):
    lines = [b'{"n": 12345678901234567890}', b'{"n": 7}']
    assert read_lines(tmp_path, lines).table["n"].to_pylist() == [12345678901234567890, 7]
    lines = [b'{"n": %d.5}' % n for n in range(20)]
    rows = read_lines(
        tmp_path, [*lines, b'{"n": 9007199254740993}', b'{"n": 9007199254740992}', b'{"n": 1e300}']
    )
    assert rows.table["n"].to_pylist()[-3:] == [None, 2.0**53, 1e300]
    assert "9007199254740993, which a double does not" in rows.bad[0].message


@pytest.fixture
def small_sample(monkeypatch):
    """A plan that looks at a few hundred bytes."""
    monkeypatch.setattr(sampling, "FIRST_BYTES", 200)
    monkeypatch.setattr(sampling, "BLOCK_BYTES", 100)


@pytest.mark.usefixtures("small_sample")
def test_columns_that_come_late_are_found_all_over_the_input(tmp_path):
    early, late = b'{"id": 1}\n' * 300, b'{"id": 2, "late": {"x": 1}}\n' * 30
    (tmp_path / "a.jsonl").write_bytes(early + late)
    assert source_of(tmp_path).schema.names == ["id", "late"]
    (tmp_path / "a.jsonl").write_bytes(early)
    for number in range(5):
        (tmp_path / f"b{number}.jsonl").write_bytes(late)
    assert source_of(tmp_path).schema.field("late").type == pa.struct([("x", pa.int64())])


@pytest.mark.usefixtures("small_sample")
def test_columns_that_the_plan_did_not_see_are_reported_with_their_rows(tmp_path):
    some = [b'{"id": 1, "s": {"x": 1}}'] * 1000
    late = [
        b'{"id": 2, "late": "a"}',
        b'{"id": 3, "late": 5, "s": {"x": 2, "y": 3}}',
        b'{"id": 4, "none": null}',
    ]
    lines = [*some[:130], *late, *some]
    rows = read_lines(tmp_path, lines, split_rows=500)
    assert rows.unplanned == {"late": 2, "s.y": 1}
    assert rows.bad == []
    assert rows.table.slice(130, 2).to_pylist() == [{"id": 2, "s": None}, {"id": 3, "s": {"x": 2}}]
    rows = read_lines(tmp_path, lines, split_rows=500, types={"late": "string"})
    assert rows.table["late"].to_pylist()[130:132] == ["a", "5"]
    assert rows.unplanned == {"s.y": 1}
    with pytest.raises(SpecError, match=r"input\.types: column 'never' not in input"):
        source_of(tmp_path, types={"never": "string"})


@pytest.mark.usefixtures("small_sample")
def test_other_types_later_in_the_input_are_reported_by_the_plan(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "n": 1}\n' * 100)
    (tmp_path / "b.jsonl").write_bytes(b'{"id": 1.5, "n": "x"}\n' * 100)
    source = source_of(tmp_path)
    assert source.schema == pa.schema([("id", pa.float64()), ("n", pa.int64())])
    assert source.notes == [
        "column 'n' is int64, but string in some rows of b.jsonl, which will be rejects; fix them, or read the column "
        "as text with input.types: {n: string}"
    ]


def test_types_of_an_earlier_run_hold(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1, "tags": ["a"], "s": {"x, y": 1.5}, "none": null}\n')
    source = source_of(tmp_path)
    kept = json.loads(json.dumps(source.types))
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "one", "none": "x"}\n{"id": 2}\n')
    again = open_source(InputSpec(path=str(tmp_path)), kept)
    assert again.schema == source.schema
    rows = read_all(again, again.cut(10))
    assert rows.table["id"].to_pylist() == [None, 2]
    assert "input.types: {id: string}" in rows.bad[0].message
    assert "1 of 2 sampled rows" in again.notes[0]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.csv").write_text("id,zip\n1,5\n")
    kept = json.loads(json.dumps(source_of(tmp_path).types))
    (tmp_path / "a.csv").write_text("id,zip\nx,007\n2,8\n")
    again = open_source(InputSpec(path=str(tmp_path)), kept)
    rows = read_all(again, again.cut(10))
    assert rows.table.to_pylist() == [{"id": None, "zip": None}, {"id": 2, "zip": 8}]
    assert len(rows.bad) == 1
    given = open_source(InputSpec(path=str(tmp_path), types={"zip": "string", "id": "string"}), kept)
    assert read_all(given, given.cut(10)).table["zip"].to_pylist() == ["007", "8"]
