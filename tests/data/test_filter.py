"""What a filter may depend on: the columns that the condition names, as the files spell them, and nothing else."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.reader import filter_columns, filter_faults, read_split
from hfbatch.errors import SplitError
from tests.data.inputs import plan_of, read_all, source_of

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("text", pa.string()),
        ("user", pa.string()),
        ("ts", pa.timestamp("us")),
        ("items", pa.list_(pa.int64())),
        ("s", pa.struct([("a", pa.int64()), ("b", pa.struct([("c", pa.string())]))])),
        ("twins", pa.struct([("a", pa.int64()), ("A", pa.int64())])),
        ("Big Name", pa.float64()),
        ("json", pa.json_()),
        ("uuid", pa.uuid()),
        ("half", pa.float16()),
        ("long", pa.decimal256(20, 2)),
    ]
)
UNSTABLE = {
    "now() > ts": "now", "current_date > ts": "current_date", "CURRENT_TIMESTAMP > ts": "current_timestamp",
    "localtimestamp > ts": "localtimestamp", "current_localtimestamp() > ts": "current_localtimestamp",
    '"random"() < 0.5': "random", "Random ( ) < 0.5": "random", "uuid() = uuid": "uuid", "today() > ts": "today",
    "list_transform(items, lambda x: random()) = [1]": "random", "ago(interval 1 day) < ts": "ago",
    "age(ts) > interval 1 day": "age", "ts.age() > interval 1 day": "age", "nextval('x') = 1": "nextval",
    "current_setting('TimeZone') = 'UTC'": "current_setting", "getvariable('x') = 1": "getvariable",
    "list_aggregate(items, 'reservoir_quantile', 0.5) = 1": "reservoir_quantile",
    "case when id = 1 then txid_current() = 1 else true end": "txid_current",
}  # fmt: skip
"""Conditions, and what they call that gives another answer on each rerun or node."""


@pytest.mark.parametrize(("condition", "called"), UNSTABLE.items(), ids=UNSTABLE)
def test_what_depends_on_clock_chance_or_settings_is_refused(condition, called):
    (fault,) = filter_faults(condition, SCHEMA)
    assert f"calls {called}, which gives another answer on each rerun" in fault


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ("id in (select id from hfbatch_rows)", "it has a subquery"),
        ("exists(select 1)", "it has a subquery"),
        ("row_number() over () > 1", "it has a window function"),
        ("sum(id) > 1", "cannot contain aggregates"),
        ("COLUMNS(*) > 1", "it has * or COLUMNS(...)"),
        ("id > $1", "it has a parameter"),
        ("#1 = 1", "it has a column by its number"),
        ("id > 1 limit 1", "syntax error"),
        ("id = 1) union select (1", "more than a condition"),
        ("rowid = 1", "names 'rowid', which is no column"),
        ("hfbatch_rows.id = 1", "names 'hfbatch_rows', which is no column"),
        ("main.lower(text) = 'x'", "names 'main', which is no column"),
        ("list_aggregate(items, 'reservoir' || '_quantile') = 1", "write that name as text"),
        ("read_text('/etc/passwd') is null", "is a table function"),
        ("ts < 'now'", "invalid timestamp"),
        ("twins.A = 1", "the fields of column 'twins' 'a' and 'A', which SQL does not distinguish"),
        ("(" * 2000 + "id = 1" + ")" * 2000, "depth limit"),
    ],
)
def test_a_condition_is_about_the_columns_of_one_row(condition, fault):
    (found,) = filter_faults(condition, SCHEMA)
    assert fault in found


@pytest.mark.parametrize(
    ("condition", "columns"),
    [
        ("\"user\" = 'x' and USER ilike '%y'", ["user"]),
        ("s.a = 1 or s.b.c = 'x'", ["s"]),
        ("list_filter(items, lambda text: text > 1) = [1]", ["items"]),
        ("[x for x in items if x > 1] = [1]", ["items"]),
        ("text.lower() = 'text'", ["text"]),
        ("split_part(nullif(text, 'id'), ',', 1) = 'ts'", ["text"]),
        ("list_sum(items) > 1 and ts < '2024-01-01'", ["ts", "items"]),
        ("age(ts, ts) = interval 0 day and id in (1, 2)", ["id", "ts"]),
        ("json ->> '$.a' = '1' and half > 1 and long > 2", ["json", "half", "long"]),
        ("uuid = '00000000-0000-0000-0000-000000000005'", ["uuid"]),
        ('"Big Name" < 2 or "BIG NAME" > 3', ["Big Name"]),
    ],
)
def test_a_condition_reads_the_columns_that_it_names(condition, columns):
    assert filter_faults(condition, SCHEMA) == []
    assert filter_columns(condition, SCHEMA) == columns


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(st.sampled_from(["lang", "Lang", "LANG", "läng", "LÄNG"]), min_size=1, max_size=4, unique=True),
    asked=st.sampled_from(["lang", "Lang", "LANG", "läng", "LÄNG"]),
    quoted=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_a_filter_reads_the_column_of_the_name_in_the_files_or_is_refused(
    tmp_path_factory, names, asked, quoted, data
):
    folder = tmp_path_factory.mktemp("names")
    columns = {name: data.draw(st.lists(st.sampled_from("ab"), min_size=5, max_size=5)) for name in names}
    pq.write_table(pa.table({"row": range(5), **columns}), folder / "a.parquet")
    condition = f"\"{asked}\" = 'a'" if quoted else f"{asked} = 'a'"
    source = source_of(folder)
    # SQL knows the case of ASCII letters only, and not even that.
    alike = [name for name in names if name.encode().lower() == asked.encode().lower()]
    meant = alike[0] if len(alike) == 1 else asked if asked in alike and quoted else None
    faults = filter_faults(condition, source.schema)
    if meant is None:
        assert faults
        with pytest.raises(SplitError, match=r"names '\w+', (but there are columns|which is no column)"):
            read_all(source, source.cut(10), condition)
    else:
        assert faults == []
        kept = read_all(source, source.cut(10), condition).table["row"].to_pylist()
        assert kept == [row for row, value in enumerate(columns[meant]) if value == "a"]


def test_two_columns_that_differ_in_case_only_are_not_compared():
    schema = pa.schema([("Lang", pa.string()), ("lang", pa.string())])
    (fault,) = filter_faults('"Lang" = "lang"', schema)
    assert "columns 'Lang' and 'lang', which SQL does not distinguish; rename one of them" in fault


HOURS = [dt.datetime(2024, 1, 1, tzinfo=dt.UTC) + dt.timedelta(hours=3 * k) for k in range(-8, 16)]
ZONES = ["UTC", "America/New_York", "Asia/Tokyo", "+05:30"]


@settings(max_examples=25, deadline=None)
@given(
    hours=st.lists(st.sampled_from(HOURS), min_size=1, max_size=10),
    zone=st.sampled_from(ZONES),
    bound=st.sampled_from(HOURS),
    unit=st.sampled_from(["ms", "us"]),
)
def test_times_are_compared_in_utc(tmp_path_factory, hours, zone, bound, unit):
    folder = tmp_path_factory.mktemp("zones")
    aware = pa.array(hours, pa.timestamp(unit, zone))
    naive = aware.cast(pa.timestamp(unit, "UTC")).cast(pa.timestamp(unit))
    pq.write_table(pa.table({"n": range(len(hours)), "aware": aware, "naive": naive}), folder / "a.parquet")
    source = source_of(folder)
    after = [n for n, hour in enumerate(hours) if hour >= bound]
    on_day = [n for n, hour in enumerate(hours) if hour.date() == bound.date()]
    moment = bound.strftime("%Y-%m-%d %H:%M:%S")
    for condition, expected in {
        f"aware >= '{moment}'": after,
        f"naive >= TIMESTAMPTZ '{moment}+00'": after,
        f"naive::timestamptz >= '{bound.astimezone(dt.timezone(dt.timedelta(hours=9)))}'": after,
        f"aware::date = '{bound.date()}'": on_day,
        f"naive::date = '{bound.date()}'": on_day,
    }.items():
        found = read_all(source, source.cut(100), condition).table["n"].to_pylist()
        assert found == expected, condition


NODE = """
import sys
from tests.data.inputs import read_all, source_of
source = source_of(sys.argv[1])
for condition in sys.argv[2:]:
    print(read_all(source, source.cut(100), condition).table["n"].to_pylist())
"""


def test_the_time_zone_of_a_node_chooses_no_rows(tmp_path):
    times = pa.array(HOURS, pa.timestamp("us", "UTC"))
    columns = {"n": range(len(HOURS)), "aware": times, "naive": times.cast(pa.timestamp("us"))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    conditions = [
        "naive > TIMESTAMPTZ '2024-01-01 12:00+00'",
        "aware::date = '2024-01-01'",
        "hour(aware) < 6",
    ]
    command = [sys.executable, "-c", NODE, str(tmp_path), *conditions]
    done = subprocess.run(
        command, env={**os.environ, "TZ": "America/New_York"}, capture_output=True, text=True, check=True
    )
    noon = dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC)
    expected = [
        [n for n, hour in enumerate(HOURS) if hour > noon],
        [n for n, hour in enumerate(HOURS) if hour.date() == noon.date()],
        [n for n, hour in enumerate(HOURS) if hour.hour < 6],
    ]
    assert done.stdout.split("\n")[:-1] == [str(rows) for rows in expected]


def test_a_condition_that_is_wrong_is_refused_on_a_worker_too(tmp_path):
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    source = source_of(tmp_path)
    with pytest.raises(SplitError, match=r"input\.filter 'random\(\) < 2' calls random"):
        read_split(source.cut(1)[0], plan_of(source, condition="random() < 2"))
