"""JSONL and CSV are cut where rows begin, and read as pyarrow reads the whole file."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfbatch.data.formats import textfiles
from hfbatch.data.formats.jsonlfiles import JsonlFormat
from hfbatch.errors import SpecError
from tests.data.inputs import read_all, source_of

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(codec="utf8", exclude_characters="\0\r"), max_size=12)
ENDS = st.sampled_from(["\n", "\r\n"])


@quick
@given(st.lists(words), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 9)), ENDS, st.booleans())
def test_csv_with_quoted_newlines_is_cut_between_rows(tmp_path, texts, split_rows, limit, end, closed):
    texts = ["first", *texts]
    file = io.StringIO()
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerow(["id", "text"])
    writer.writerows([f"x{number}", text] for number, text in enumerate(texts))
    path = tmp_path / "a.csv"
    data = file.getvalue()
    path.write_bytes((data if closed else data.removesuffix(end)).encode())
    source = source_of(path)
    splits = source.cut(split_rows, limit)
    rows = read_all(source, splits)
    assert rows.table["id"].to_pylist() == [f"x{number}" for number in range(len(texts))][:limit]
    assert rows.table["text"].to_pylist() == texts[:limit]
    assert max(split.rows for split in splits) <= split_rows


@quick
@given(
    st.lists(st.one_of(words, st.none())), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 9)), ENDS
)
def test_jsonl_is_cut_between_rows(tmp_path, texts, split_rows, limit, end):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(texts)
    ]
    path.write_bytes((end.join(['{"id": -1, "text": "first"}', *lines])).encode())
    source = source_of(path)
    rows = read_all(source, source.cut(split_rows, limit))
    assert rows.table["id"].to_pylist() == [-1, *range(len(texts))][:limit]
    assert rows.table["text"].to_pylist() == ["first", *texts][:limit]
    assert rows.places["row"].to_pylist() == list(range(len(rows.table)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_where_rows_begin_does_not_depend_on_the_chunks_of_the_scan(tmp_path, monkeypatch, chunk):
    data = b'text\r\n"a\nb"\r\n\r\n"say ""hi"""\n\nplain\n"last\n\nline"'
    (tmp_path / "a.csv").write_bytes(data)
    monkeypatch.setattr(textfiles, "CHUNK_BYTES", chunk)
    source = source_of(tmp_path / "a.csv")
    rows = read_all(source, source.cut(1))
    assert rows.table["text"].to_pylist() == ["a\nb", 'say "hi"', "plain", "last\n\nline"]


def test_blank_lines_of_jsonl_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n  \n\n{"a": 2}\n\t\n')
    source = source_of(tmp_path)
    splits = source.cut(1)
    assert [split.rows for split in splits] == [1, 1]
    assert read_all(source, splits).table["a"].to_pylist() == [1, 2]


def test_a_text_of_several_mib_is_one_row(tmp_path):
    long = "word " * 600_000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a", long, "b"]))
    source = source_of(tmp_path)
    assert read_all(source, source.cut(100)).table["text"].to_pylist() == ["a", long, "b"]


def test_splits_of_text_keep_to_their_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": "x" * 90}) + "\n" for _ in range(100)))
    runs = JsonlFormat().scan(pafs.LocalFileSystem(), str(tmp_path / "a.jsonl"), 1000, 1000)
    assert 8 <= len(runs) <= 12
    assert [run.stop for run in runs[:-1]] == [run.start for run in runs[1:]]
    assert runs[-1].stop == 100


def test_files_of_other_columns_give_nulls(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,x\n")
    (tmp_path / "b.csv").write_text("more,id\ny,2\n")
    source = source_of(tmp_path)
    assert source.files_without("text") == ["b.csv"]
    rows = read_all(source, source.cut(10))
    assert rows.table.to_pydict() == {"id": [1, 2], "text": ["x", None], "more": [None, "y"]}


def test_json_dates_stay_text_and_columns_of_nulls_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"day": "2024-01-01", "empty": null, "list": []}\n')
    assert source_of(tmp_path).schema == pa.schema(
        [("day", pa.string()), ("empty", pa.string()), ("list", pa.list_(pa.string()))]
    )


def test_a_header_alone_and_an_empty_file_have_no_rows(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n")
    (tmp_path / "b.csv").write_text("")
    source = source_of(tmp_path)
    splits = source.cut(10)
    assert sum(split.rows for split in splits) == 0
    assert read_all(source, splits).table.column_names == ["id", "text"]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"id,text\r1,a\r2,b\r", "end in carriage returns only"),
        (b"text,text\na,b\n", "more than one column named 'text'"),
    ],
)
def test_a_file_that_would_lose_rows_or_columns_is_refused(tmp_path, data, fault):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(SpecError, match=fault):
        source_of(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"id,text\r\n1,a\r\n")
    assert fault in source_of(tmp_path).broken["a.csv"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid,text\n1,x\n")
    assert source_of(tmp_path).schema.names == ["id", "text"]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1}\n')
    source = source_of(tmp_path / "b.jsonl")
    assert read_all(source, source.cut(10)).table["id"].to_pylist() == [1]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert sum(split.rows for split in source_of(tmp_path / "*.jsonl").cut(10)) == 1


def test_tab_separated_files_are_csv(tmp_path):
    (tmp_path / "a.tsv").write_text("id\ttext\n1\ta, b\n")
    source = source_of(tmp_path)
    assert read_all(source, source.cut(10)).table.to_pydict() == {"id": [1], "text": ["a, b"]}


def test_a_json_list_is_not_jsonl(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2}\n]\n')
    with pytest.raises(SpecError, match=r"a\.json: not one JSON object per line"):
        source_of(tmp_path)


def test_a_column_of_several_types_is_reported_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"label": 1}\n{"label": "two"}\n')
    with pytest.raises(SpecError, match=r"a\.jsonl: a column has values of several types: .*label"):
        source_of(tmp_path)
