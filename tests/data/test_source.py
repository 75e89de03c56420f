"""What an input path stands for, its schema, and the errors of one that cannot be read."""

from __future__ import annotations

import datetime
import http.server
import json
import pickle
import threading
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.data.listing import NO_PARTITION
from hfbatch.data.reader import read_split
from hfbatch.data.source import open_source
from hfbatch.errors import SpecError
from hfbatch.spec.job import InputSpec
from tests.data.inputs import plan_of, read_all, source_of, write_groups


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def test_a_folder_is_listed_recursively_without_hidden_names(tmp_path):
    for name in ("b.parquet", "a/x.parquet", "_temporary/0.parquet", ".hidden.parquet", "_SUCCESS"):
        write_groups(tmp_path / name, [[1]])
    assert [file.path for file in source_of(tmp_path).files] == ["a/x.parquet", "b.parquet"]


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("a/*.parquet", ["1.parquet", "2.parquet"]),
        ("*/1.parquet", ["a/1.parquet", "b/1.parquet"]),
        ("**/2.parquet", ["a/2.parquet"]),
        ("[b-c]", ["b/1.parquet"]),
        ("a/?.parquet", ["1.parquet", "2.parquet"]),
        ("a/2.parquet", ["2.parquet"]),
    ],
)
def test_globs_choose_files(tmp_path, pattern, files):
    for name in ("a/1.parquet", "a/2.parquet", "b/1.parquet"):
        write_groups(tmp_path / name, [[1]])
    source = source_of(tmp_path / pattern)
    assert [file.path for file in source.files] == files
    assert len(read_all(source, source.cut(10)).table) == len(files)


def test_names_of_classes_are_those_that_datasets_wrote(tmp_path):
    sorts = datasets.ClassLabel(names=["World", "Sports"])
    kinds = {"label": sorts, "tags": datasets.List(sorts), "number": datasets.Value("int64")}
    values = {"label": [1, -1], "tags": [[0, 1], []], "number": [3, 4]}
    made = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
    for name in ("a", "b"):
        made.to_parquet(str(tmp_path / f"{name}.parquet"))
    source = source_of(tmp_path)
    names = [source.classes_of(column) for column in ("label", "tags", "number", "none")]
    assert names == [("World", "Sports"), ("World", "Sports"), None, None]
    schema = pa.schema([("label", pa.int64())], {b"huggingface": b"[not what datasets writes"})
    pq.write_table(pa.table({"label": [1]}, schema), tmp_path / "c.parquet")
    assert source_of(tmp_path).classes_of("label") == ("World", "Sports")
    made.cast_column("label", datasets.ClassLabel(names=["a", "b"])).to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(SpecError, match=r"'label' has other class names in d\.parquet than in a\.parquet"):
        source_of(tmp_path).classes_of("label")


def test_names_of_classes_are_those_that_older_versions_of_datasets_wrote(tmp_path):
    label = {"names": ["no", "yes"], "_type": "ClassLabel"}
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "label": label,
        "tags": {"feature": label, "length": -1, "_type": "Sequence"},
        "votes": [label],
        "messages": [{"role": text, "content": text}],
        "answers": {"feature": {"text": text, "start": text}, "_type": "Sequence"},
        "odd": [],
    }
    about = json.dumps({"info": {"features": features}}).encode()
    schema = pa.schema([("label", pa.int64())], {b"huggingface": about})
    pq.write_table(pa.table({"label": [1]}, schema), tmp_path / "a.parquet")
    source = source_of(tmp_path)
    assert {name for name in features if source.classes_of(name) == ("no", "yes")} == {
        "label",
        "tags",
        "votes",
    }


def test_hive_folders_become_columns(tmp_path):
    write(tmp_path / "day=1" / "lang=en%20gb" / "a.parquet", id=[1, 2])
    write(tmp_path / "day=2" / "lang=__HIVE_DEFAULT_PARTITION__" / "a.parquet", id=[3])
    write(tmp_path / "day=3" / "a.parquet", id=[4])
    source = source_of(tmp_path)
    assert source.hive == {"day": pa.int64(), "lang": pa.string()}
    rows = read_all(source, source.cut(10))
    assert rows.table.to_pydict() == {
        "id": [1, 2, 3, 4],
        "day": [1, 1, 2, 3],
        "lang": ["en gb", "en gb", None, None],
    }
    assert source.files_without("lang") == ["day=3/a.parquet"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", "9223372036854775807"], pa.int64()),
        (["01234", "99999"], pa.string()),
        (["٣", "4"], pa.string()),
        (["+1"], pa.string()),
        (["-0"], pa.string()),
        (["9223372036854775808"], pa.string()),
        (["1.5"], pa.string()),
        (["true"], pa.string()),
        ([" 1"], pa.string()),
        ([NO_PARTITION], pa.string()),
        (["1", NO_PARTITION], pa.int64()),
        (["1", "NA"], pa.string()),
        (["1", "null"], pa.string()),
        (["1", ""], pa.string()),
    ],
)
def test_a_partition_is_a_number_only_where_its_folders_can_be_named_again(tmp_path, values, kind):
    for value in values:
        write(tmp_path / f"v={value}" / "a.parquet", id=[1])
    source = source_of(tmp_path)
    assert source.hive == {"v": kind}
    texts = [None if value == NO_PARTITION else value for value in values]
    rows = read_all(source, source.cut(10))
    assert sorted(map(str, rows.table["v"].to_pylist())) == sorted(map(str, texts))
    assert rows.bad == []
    assert any("v ('01234' would" in note for note in source.notes) == (values[0] == "01234")


def test_the_spec_and_an_earlier_run_give_types_to_partitions(tmp_path):
    write(tmp_path / "zip=1234" / "a.parquet", id=[1])
    assert source_of(tmp_path, types={"zip": "string"}).hive == {"zip": pa.string()}
    kept = source_of(tmp_path).types
    assert kept == {"zip": "int64"}
    write(tmp_path / "zip=01234" / "a.parquet", id=[2])
    source = open_source(InputSpec(path=str(tmp_path)), json.loads(json.dumps(kept)))
    rows = [read_split(split, plan_of(source)) for split in source.cut(1)]
    assert sorted(row.table["zip"].to_pylist()[0] or 0 for row in rows) == [0, 1234]
    (bad,) = (bad for row in rows for bad in row.bad)
    assert bad.message.startswith("column 'zip' is int64, but the row has '01234' in the name of its folder")
    assert "input.types: {zip: string}" in bad.message


def test_wrong_types_in_the_spec_are_all_reported(tmp_path):
    write(tmp_path / "zip=1" / "a.parquet", id=[1])
    with pytest.raises(SpecError) as caught:
        source_of(tmp_path, types={"id": "string", "nope": "string", "zip": "list<string>"})
    parquet, unknown, nested = caught.value.faults
    assert "column 'id' has its type in the Parquet files" in parquet
    assert "column 'nope' not in input (has: id, zip)" in unknown
    assert "column 'zip' cannot be list<item: string>" in nested
    with pytest.raises(SpecError) as caught:
        source_of(tmp_path, types={"zip": "sting", "id": {}, "x": ["int64", "int64"]})
    assert [fault.split(";")[0] for fault in caught.value.faults] == [
        "input.types: 'sting' of column 'zip' is not a type",
        "input.types: {} of column 'id' is not a type",
        "input.types: ['int64', 'int64'] of column 'x' is not a type",
    ]


def test_a_partition_can_be_filtered(tmp_path):
    write(tmp_path / "lang=en" / "a.parquet", id=[1, 2])
    write(tmp_path / "lang=de" / "a.parquet", id=[3])
    source = source_of(tmp_path)
    assert read_all(source, source.cut(10), "lang = 'en'").table["id"].to_pylist() == [1, 2]


def test_shards_with_differing_schemas_are_united(tmp_path):
    write(tmp_path / "a.parquet", id=pa.array([1], pa.int32()), text=["x"])
    write(tmp_path / "b.parquet", id=pa.array([2**40], pa.int64()), extra=[1.5])
    write(tmp_path / "c.parquet", text=pa.array(["y"]).dictionary_encode(), id=pa.array([None], pa.null()))
    source = source_of(tmp_path)
    assert source.schema == pa.schema([("id", pa.int64()), ("text", pa.string()), ("extra", pa.float64())])
    assert source.files_without("text") == ["b.parquet"]
    rows = read_all(source, source.cut(10))
    assert rows.table.to_pydict() == {
        "id": [1, 2**40, None],
        "text": ["x", None, "y"],
        "extra": [None, 1.5, None],
    }


def test_contradicting_types_of_columns_that_are_read_name_both_files(tmp_path):
    write(tmp_path / "a.parquet", id=[1], text=["x"], junk=[1])
    write(tmp_path / "b.parquet", id=["one"], text=[1], junk=[0.5])
    source = source_of(tmp_path)
    faults = source.faults_of(["id", "text"])
    assert len(faults) == 2
    assert "column 'id' is int64 in a.parquet but string in b.parquet" in faults[0]
    assert source.faults_of(["absent"]) == []
    assert [f for f in source.faults_of(["junk"]) if "is int64 in a.parquet but double in b.parquet" in f]


def test_files_that_disagree_on_columns_that_nobody_reads_are_read(tmp_path):
    write(tmp_path / "a.parquet", id=[1], junk=["x"], at=pa.array([0], pa.timestamp("us")))
    write(tmp_path / "b.parquet", id=[2], junk=[1.5], at=pa.array([0], pa.timestamp("ns")))
    twice = pa.Table.from_arrays([pa.array([3]), pa.array([1]), pa.array(["y"])], ["id", "junk", "junk"])
    pq.write_table(twice, tmp_path / "c.parquet")
    source = source_of(tmp_path)
    rows = [read_split(split, plan_of(source, ("id",), "id > 1")) for split in source.cut(100)]
    assert pa.concat_tables([each.table for each in rows]).to_pydict() == {"id": [2, 3]}
    assert source.faults_of(["id"]) == []
    assert len(source.faults_of(["junk", "at"])) == 2


def test_a_column_that_occurs_twice_is_no_column_to_read(tmp_path):
    twice = pa.Table.from_arrays([pa.array([1]), pa.array(["y"])], ["x", "x"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert source_of(tmp_path).faults_of(["x"]) == [
        "a.parquet has more than one column named 'x'; rename one of them"
    ]


def test_times_in_int96_keep_their_year(tmp_path):
    years = [datetime.datetime(year, 1, 2, 3, 4, 5, 6) for year in (1, 1066, 1969, 2024, 2500, 9999)]
    times = pa.array(years, pa.timestamp("us"))
    table = pa.table({"time": times, "times": pa.array([[year] for year in years], pa.list_(times.type))})
    pq.write_table(table, tmp_path / "a.parquet", use_deprecated_int96_timestamps=True)
    write(tmp_path / "b.parquet", time=times)
    source = source_of(tmp_path)
    assert source.schema == table.schema
    rows = read_all(source, source.cut(100), "year(time) > 2262").table
    assert rows["time"].to_pylist() == 2 * years[-2:]
    assert rows["times"].to_pylist() == [[year] for year in years[-2:]] + [None, None]


def test_a_truncated_file_is_a_split_with_a_fault(tmp_path):
    for name in ("a", "b", "c"):
        write_groups(tmp_path / f"{name}.parquet", [[1, 2]])
    path = tmp_path / "b.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    source = source_of(tmp_path)
    assert list(source.broken) == ["b.parquet"]
    faulty = [split for split in source.cut(1000) if split.fault]
    assert [(split.pieces[0].file, split.rows) for split in faulty] == [("b.parquet", 0)]
    assert faulty[0].fault.startswith("b.parquet cannot be read: ")
    assert sum(split.rows for split in source.cut(1000)) == 4


def test_a_file_of_no_bytes_is_broken(tmp_path):
    write_groups(tmp_path / "a.parquet", [[1]])
    (tmp_path / "b.parquet").touch()
    assert "0 bytes" in source_of(tmp_path).broken["b.parquet"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "", "holds no files"),
        (["notes.txt"], "", r"holds no file that ends in \.parquet.*there is: notes\.txt"),
        (["notes.txt"], "absent", r"absent does not exist \(there is: notes\.txt\)"),
        (
            ["a.jsonl", "b.jsonl.gz"],
            "",
            r"compressed files, which are not read \(there is: b\.jsonl\.gz\); unpack them",
        ),
        (["a.csv", "b.jsonl"], "", r"several formats \(1 csv, 1 jsonl\); choose one with input\.format"),
        (["a.csv"], "*.parquet", r"matches none of the 1 files.*there is: a\.csv"),
        (["a.csv"], "sub/*.parquet", r"there is no folder .*sub \(there is: a\.csv\)"),
        (["a.parquet"], "", r"none of the 1 input files can be read; a\.parquet: "),
    ],
)
def test_an_input_without_rows_says_what_is_there(tmp_path, files, path, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(SpecError, match=message):
        source_of(f"{tmp_path}/{path}")


def test_an_unknown_scheme_says_what_to_write():
    with pytest.raises(SpecError, match=r"nosuch://x cannot be opened: .*write a local path, s3://"):
        source_of("nosuch://x")


def test_a_named_format_chooses_among_formats(tmp_path):
    (tmp_path / "a.csv").write_text("id\n1\n")
    (tmp_path / "b.jsonl").write_text('{"id": 2}\n')
    source = source_of(tmp_path, format="jsonl")
    assert [file.path for file in source.files] == ["b.jsonl"]


def test_a_named_format_reads_files_without_an_ending(tmp_path):
    write_groups(tmp_path / "part-00000", [[1]])
    assert source_of(tmp_path, format="parquet").schema.names == ["id", "text"]


def test_an_fsspec_url_is_read_like_a_folder():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/lake/k=1/a.csv", b"id,text\n1,x\n2,y\n")
    source = source_of("memory://lake")
    rows = read_all(source, source.cut(1))
    assert rows.table.to_pydict() == {"id": [1, 2], "text": ["x", "y"], "k": [1, 1]}
    memory.rm("/lake", recursive=True)


def test_a_read_plan_is_small_and_travels(tmp_path):
    for number in range(50):
        write_groups(tmp_path / f"{number}.parquet", [[number]])
    plan = plan_of(source_of(tmp_path))
    stored = pickle.dumps(plan)
    assert len(stored) < 2000
    assert pickle.loads(stored) == plan


def test_a_signed_url_is_refused_since_its_name_goes_into_every_part(tmp_path):
    write_groups(tmp_path / "a.parquet", [[1]])
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.parquet"
        with pytest.raises(SpecError, match="holds a secret that would be written") as caught:
            open_source(InputSpec(path=f"{url}?X-Amz-Signature=verysecret", format="parquet"))
        assert "verysecret" not in str(caught.value)
        assert open_source(InputSpec(path=url)).schema.names == source_of(tmp_path).schema.names
        server.shutdown()
