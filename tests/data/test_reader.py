"""Reading a split: filter, and files that change or vanish while the job runs."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.reader import ReadPlan, filter_columns, filter_faults, read_split
from hfbatch.data.splits import Piece, Split
from hfbatch.errors import SplitError
from tests.data.inputs import plan_of, read_all, source_of, write_groups

SCHEMA = pa.schema([("id", pa.int64()), ("lang", pa.string()), ("Big Name", pa.float64())])


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.one_of(st.none(), st.integers(-5, 5)), max_size=60), split_rows=st.integers(1, 30))
def test_a_filter_keeps_rows_for_which_it_is_true_in_order(tmp_path_factory, ids, split_rows):
    folder = tmp_path_factory.mktemp("input")
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64())}), folder / "a.parquet")
    source = source_of(folder)
    rows = read_all(source, source.cut(split_rows), "id > 0 -- nulls are not")
    kept = [row for row, value in enumerate(ids) if value is not None and value > 0]
    assert rows.table["id"].to_pylist() == [ids[row] for row in kept]
    assert rows.places["row"].to_pylist() == kept
    assert rows.read == len(ids)


def test_only_the_wanted_columns_come_in_the_planned_order(tmp_path):
    write_groups(tmp_path / "a.parquet", [[1, 2], [3]])
    source = source_of(tmp_path)
    (split,) = source.cut(10)
    rows = read_split(split, plan_of(source, ("text", "id")))
    assert rows.table.schema == pa.schema([("text", pa.string()), ("id", pa.int64())])
    assert rows.table["id"].to_pylist() == [1, 2, 3]


def test_places_name_file_and_row_of_each_row(tmp_path):
    write_groups(tmp_path / "a.parquet", [[1, 2]])
    write_groups(tmp_path / "b.parquet", [[3]])
    source = source_of(tmp_path)
    places = read_all(source, source.cut(100)).places
    assert places.to_pydict() == {"file": ["a.parquet", "a.parquet", "b.parquet"], "row": [0, 1, 0]}
    assert places.schema == pa.schema([("file", pa.string()), ("row", pa.int64())])


def test_a_changed_file_asks_for_a_rerun(tmp_path):
    path = tmp_path / "a.parquet"
    write_groups(path, [[1]])
    source = source_of(tmp_path)
    (split,) = source.cut(10)
    os.utime(path, ns=(0, 5))
    with pytest.raises(SplitError, match=r"a\.parquet changed while the job ran; run again"):
        read_split(split, plan_of(source))


def test_a_vanished_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_groups(path, [[1]])
    source = source_of(tmp_path)
    (split,) = source.cut(10)
    path.unlink()
    with pytest.raises(SplitError, match=r"a\.parquet is gone from"):
        read_split(split, plan_of(source))


def test_damaged_pages_fail_the_split_by_name(tmp_path):
    path = tmp_path / "a.parquet"
    write_groups(path, [list(range(1000))])
    data = bytearray(path.read_bytes())
    data[10:400] = b"\xff" * 390
    path.write_bytes(data)
    source = source_of(tmp_path)
    (split,) = source.cut(1000)
    with pytest.raises(SplitError, match=r"a\.parquet \(rows 0-1000\) cannot be read: "):
        read_split(split, plan_of(source))


def test_a_split_with_a_fault_raises_it():
    split = Split((Piece("a.parquet", 0, 0, 1, 1),), "a.parquet cannot be read: no footer")
    with pytest.raises(SplitError, match="no footer"):
        read_split(split, ReadPlan("/", "parquet", (), pa.schema([])))


def test_a_filter_that_fails_on_a_row_names_filter_and_file(tmp_path):
    pq.write_table(pa.table({"text": ["1", "x"]}), tmp_path / "a.parquet")
    source = source_of(tmp_path)
    (split,) = source.cut(10)
    with pytest.raises(SplitError, match=r"input\.filter 'text::int > 0' fails on rows of a\.parquet"):
        read_split(split, plan_of(source, condition="text::int > 0"))


@pytest.mark.parametrize(
    "condition", ["id > 1", "lang in ('en', 'de') and id is not null", '"big name" < 2', "id < 1 --x"]
)
def test_a_condition_on_the_columns_has_no_faults(condition):
    assert filter_faults(condition, SCHEMA) == []


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ("language = 'en'", r"language.*\(columns: id, lang, Big Name\)"),
        ("id >", "syntax error|end of input"),
        ("lang", "is a VARCHAR, not true or false"),
        ("random() < 0.5", "calls random, which gives another answer on each rerun"),
        ("id > 1); DROP TABLE x; --", "is not a SQL condition"),
        (
            "id in (select 1 from read_csv('/etc/passwd'))",
            "it has a subquery",
        ),
        ("id in (select id from SCHEMA)", "is not a SQL condition"),
    ],
)
def test_a_wrong_condition_is_one_line_with_the_fix(condition, fault):
    import re

    (found,) = filter_faults(condition, SCHEMA)
    assert re.search(fault, found)
    assert "\n" not in found


def test_the_columns_of_a_filter_are_found_in_any_case():
    assert filter_columns('"BIG name" > 1 or ID = 2', SCHEMA) == ["id", "Big Name"]


def test_a_dot_in_a_name_is_no_path_into_a_struct(tmp_path):
    table = pa.table({"s": [{"t": 1}, {"t": 2}], "s.t": ["a", "b"], "s.t.u": [3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = source_of(tmp_path)
    for columns in (("s",), ("s.t",), ("s.t.u",), ("s.t", "s")):
        rows = read_split(source.cut(10)[0], plan_of(source, columns))
        assert rows.table.equals(table.select(columns))
