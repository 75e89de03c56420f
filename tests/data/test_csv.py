"""Rows of CSV: a bad one is a bad row with its reason, and a column has a type where nothing of a value is lost."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.data.formats import csvfiles
from hfbatch.data.formats.texttypes import convert, found_type, name_of, type_of
from tests.data.inputs import read_all, source_of
from tests.data.test_bad_rows import KEPT, quick, read

BAD_CSV = [
    (b"7", "NotCSV", "the row has 1 field, but the header has 2"),
    (b"7,a,b", "NotCSV", "the row has 3 fields, but the header has 2; put a value with ',' in quotes"),
    (b'7,"a"b', "NotCSV", "field 2 has 'b' after its closing quote"),
    (b'7,"two\nlines"b', "NotCSV", "after its closing quote"),
    (b"7,caf\xe9", "NotUTF8", "the byte 0xe9, which is not UTF-8; save the file as UTF-8"),
    (b"x,a", "Misfit", r"column 'id' is int64, but the row has 'x'; .*input\.types: \{id: string\}"),
    (b"007,a", "Misfit", "has '007'"),
    (b"+7,a", "Misfit", r"has '\+7'"),
    (b" 7,a", "Misfit", "has ' 7'"),
    (b"7.0,a", "Misfit", "has '7.0'"),
    (b"9223372036854775808,a", "Misfit", "has '9223372036854775808'"),
]


@pytest.mark.parametrize(("line", "error", "reason"), BAD_CSV, ids=[str(line) for line, _, _ in BAD_CSV])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_row_of_csv_is_one_bad_row_and_all_others_are_read(tmp_path, line, error, reason, end):
    good = [b'%d,"row, %d"' % (number, number) for number in range(6)]
    (tmp_path / "a.csv").write_bytes(end.join([b"id,text", *good[:3], line, *good[3:]]))
    rows = read(tmp_path, split_rows=2, kept=KEPT)
    assert [bad.position for bad in rows.bad] == [3]
    assert (rows.bad[0].error, rows.bad[0].line) == (error, line.decode("utf8", "backslashreplace"))
    assert re.search(reason, rows.bad[0].message)
    table = rows.table.filter(pa.array(np.arange(7) != 3))
    assert table.to_pylist() == [{"id": number, "text": f"row, {number}"} for number in range(6)]


@pytest.mark.parametrize("chunk", [3, 16, 1 << 20])
def test_a_quote_that_is_never_closed_ends_with_its_line(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("hfbatch.data.formats.textfiles.CHUNK_BYTES", chunk)
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"a\nb"\n2,5" pipe\n3,"open\n4,c\n5,d\n')
    rows = read(tmp_path, split_rows=2)
    assert rows.table["text"].to_pylist() == ["a\nb", '5" pipe', None, "c", "d"]
    assert [(bad.position, bad.line) for bad in rows.bad] == [(2, '3,"open')]
    assert "a quote is left open in field 2" in rows.bad[0].message


def test_an_open_quote_does_not_take_in_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(csvfiles, "MOST_OPEN_BYTES", 1000)
    monkeypatch.setattr("hfbatch.data.formats.textfiles.CHUNK_BYTES", 64)
    lines = [b"%d,some text" % number for number in range(500)]
    lines[10], lines[480] = b'10,"open', b'480,"closed\nagain"'
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"id,text", *lines]))
    rows = read(tmp_path, split_rows=50)
    assert len(rows.table) == 500
    assert [bad.position for bad in rows.bad] == [10]
    assert rows.table["text"].to_pylist()[480] == "closed\nagain"


fields = st.text(st.sampled_from('ab",\n\r 07é'), max_size=6)


@quick
@given(st.lists(st.tuples(fields, fields), max_size=8), st.binary(max_size=20), st.integers(1, 4))
def test_what_the_csv_module_writes_is_read_again_whatever_follows(tmp_path, rows, garbage, split_rows):
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("k", "v"), ("x", "y"), *rows])
    (tmp_path / "a.csv").write_bytes(file.getvalue().encode() + garbage)
    found = read(tmp_path, split_rows=split_rows)
    assert [tuple(row.values()) for row in found.table.slice(1, len(rows)).to_pylist()] == rows


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", "0", ""], "int64"),
        (["1", "NA", "null"], "int64"),
        (["9223372036854775807"], "int64"),
        (["9223372036854775808"], "string"),
        (["007", "8"], "string"),
        (["+1"], "string"),
        (["1 "], "string"),
        (["-0"], "double"),
        (["1.5", "2", "-0.25", "1.0"], "double"),
        (["1e-05", "5e-324", "1e+20", "1.5E-7"], "double"),
        (["0.1234567890123456", "123456789012.12344"], "double"),
        (["1.10"], "string"),
        (["1e5"], "string"),
        (["1e400"], "string"),
        (["1234567890123456.78"], "string"),
        (["0.12345678901234567890"], "string"),
        (["01.5"], "string"),
        ([".5"], "string"),
        (["1,5"], "string"),
        (["٣"], "string"),
        (["true", "false"], "bool"),
        (["TRUE", "false"], "string"),
        (["2024-02-29"], "date32[day]"),
        (["2024-02-30"], "string"),
        (["01/02/2024"], "string"),
        (["2024-01-01 10:00:00"], "timestamp[s]"),
        (["2024-01-01T10:00:00"], "string"),
        (["2024-01-01 10:00:00.500"], "string"),
        (["NA", ""], "string"),
        (["1", "x"], "string"),
    ],
)
def test_a_column_of_csv_has_a_type_only_where_nothing_of_a_value_is_lost(tmp_path, values, kind):
    (tmp_path / "a.csv").write_text("k,v\n" + "".join(f'x,"{value}"\n' for value in values))
    source = source_of(tmp_path)
    assert str(source.schema.field("v").type) == kind
    rows = read_all(source, source.cut(100))
    assert rows.bad == []
    if kind == "string":
        assert rows.table["v"].to_pylist() == values


def test_the_plan_names_columns_that_stay_text_and_the_spec_gives_them_a_type(tmp_path):
    (tmp_path / "a.csv").write_text("zip,price,name\n01234,1.10,x\n99999,2.50,y\n")
    (note,) = source_of(tmp_path).notes
    assert (
        "zip ('01234' would not be the same as int64), price ('1.10' would not be the same as double)" in note
    )
    assert "input.types" in note
    types = {"zip": "int32", "price": "decimal128(10, 2)", "name": "string"}
    source = source_of(tmp_path, types=types)
    assert source.notes == []
    table = read_all(source, source.cut(10)).table
    assert {name: str(table.schema.field(name).type) for name in types} == types
    assert [str(value) for value in table["price"].to_pylist()] == ["1.10", "2.50"]


def test_types_come_from_the_first_rows_of_all_files(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.csv").write_text(f"zip\n{'0123' if number == 39 else 4000 + number}\n")
    assert source_of(tmp_path).schema == pa.schema([("zip", pa.string())])


@quick
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1),
    st.lists(st.integers(), min_size=1),
)
def test_numbers_that_python_writes_have_a_type_and_come_back(floats, numbers):
    kind, _ = found_type(pa.array([repr(value) for value in floats]))
    assert kind == pa.float64()
    array, misfits = convert(pa.array([repr(value) for value in floats]), kind, exact=True)
    assert array.to_pylist() == floats
    assert not misfits.any()
    kind, _ = found_type(pa.array([str(value) for value in numbers]))
    fits = all(-(2**63) <= value < 2**63 for value in numbers)
    assert (kind == pa.int64()) == fits


@pytest.mark.parametrize(
    "name",
    ["string", "uint8", "double", "bool", "date32", "timestamp[us]", "timestamp[ms, tz=Europe/Berlin]", "decimal128(38, 2)",
     "list<string>", "list<item: struct<a: int64, b: list<double>>>", ["string"], {"a, b": ["int64"]}],
)  # fmt: skip
def test_a_type_can_be_named_and_kept(name):
    kind = type_of(name)
    assert type_of(json.loads(json.dumps(name_of(kind)))) == kind
