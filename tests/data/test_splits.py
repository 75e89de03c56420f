"""Cutting: every row in exactly one split, in input order, whatever the layout."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.formats.base import SPLIT_BYTES
from hfbatch.data.formats.parquetfiles import MOST_SLICES, cut_groups
from hfbatch.data.splits import Split
from tests.data.inputs import read_all, source_of, write_groups

layouts = st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=6)


def write_layout(folder: Path, layout: list[list[int]]) -> list[int]:
    """Files with row groups of these sizes in two folders; ids count up in input order."""
    ids = iter(range(10**9))
    for number, groups in enumerate(layout):
        path = folder / ("a" if number < 3 else "b") / f"{number:03d}.parquet"
        write_groups(path, [[next(ids) for _ in range(count)] for count in groups])
    return list(range(next(ids)))


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(1, 60), st.one_of(st.none(), st.integers(1, 120)))
def test_every_row_is_in_exactly_one_split_in_input_order(layout, split_rows, limit):
    with tempfile.TemporaryDirectory() as name:
        ids = write_layout(Path(name), layout)
        source = source_of(name)
        splits = source.cut(split_rows, limit)
        rows = read_all(source, splits)
        assert rows.table["id"].to_pylist() == ids[:limit]
        assert rows.read == len(ids[:limit]) == sum(split.rows for split in splits)
        assert len({split.part for split in splits}) == len(splits)
        written = {
            file.path: pq.read_table(Path(name) / file.path)["id"].to_pylist() for file in source.files
        }
        places = zip(rows.places["file"].to_pylist(), rows.places["row"].to_pylist(), strict=True)
        assert [written[file][row] for file, row in places] == ids[:limit]


@settings(max_examples=20, deadline=None)
@given(layouts, st.integers(1, 60))
def test_the_same_files_are_always_cut_alike(layout, split_rows):
    with tempfile.TemporaryDirectory() as name:
        write_layout(Path(name), layout)
        assert source_of(name).cut(split_rows) == source_of(name).cut(split_rows)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, SPLIT_BYTES * 2)), max_size=30),
    st.integers(1, 3000),
)
def test_ranges_follow_each_other_and_keep_to_their_targets(groups, split_rows):
    rows, sizes = [g[0] for g in groups], [g[1] for g in groups]
    ranges = cut_groups(rows, sizes, split_rows)
    assert [start for start, _, _ in ranges] == [0, *(stop for _, stop, _ in ranges[:-1])]
    assert ranges[-1][1] == sum(rows)
    most = max(
        [split_rows, *(-(-count // min(MOST_SLICES, -(-count // split_rows))) for count in rows if count)]
    )
    assert all(stop - start <= most for start, stop, _ in ranges)


def test_row_groups_are_joined_up_to_split_rows():
    assert cut_groups([100] * 5, [1] * 5, 250) == [(0, 200, 2), (200, 400, 2), (400, 500, 1)]


def test_row_groups_are_joined_up_to_64_mib():
    half = SPLIT_BYTES // 2
    assert [r[:2] for r in cut_groups([10] * 4, [half] * 4, 1000)] == [(0, 20), (20, 40)]


def test_a_large_row_group_is_sliced_evenly_and_at_most_16_times():
    assert [r[:2] for r in cut_groups([1000], [1], 400)] == [(0, 334), (334, 668), (668, 1000)]
    assert len(cut_groups([100_000], [1], 10)) == MOST_SLICES


def test_small_files_of_one_folder_share_a_split(tmp_path):
    for folder in "ab":
        for number in range(40):
            write_groups(tmp_path / folder / f"{number:02d}.parquet", [[number]])
    splits = source_of(tmp_path).cut(1000)
    assert len(splits) < 20
    assert all(len({p.file[0] for p in split.pieces}) == 1 for split in splits)


def test_a_new_small_file_recuts_only_its_neighbours(tmp_path):
    for number in range(0, 400, 2):
        write_groups(tmp_path / f"{number:03d}.parquet", [[number]])
    before = {split.part for split in source_of(tmp_path).cut(1000)}
    write_groups(tmp_path / "201.parquet", [[201]])
    after = {split.part for split in source_of(tmp_path).cut(1000)}
    assert len(before) > 5
    assert len(before - after) == 1


def test_a_new_large_file_leaves_all_parts_valid(tmp_path):
    for number in (0, 2):
        write_groups(tmp_path / f"{number}.parquet", [list(range(100))])
    before = {split.part for split in source_of(tmp_path).cut(50)}
    write_groups(tmp_path / "1.parquet", [list(range(100))])
    assert before < {split.part for split in source_of(tmp_path).cut(50)}


def test_a_changed_file_gives_another_part_name_at_the_same_place(tmp_path):
    path = tmp_path / "a.parquet"
    write_groups(path, [[1, 2]])
    (before,) = source_of(tmp_path).cut(10)
    os.utime(path, ns=(0, 1_000_000_000))
    (after,) = source_of(tmp_path).cut(10)
    assert before.part != after.part
    assert before.where == after.where


def test_a_file_without_rows_keeps_its_split(tmp_path):
    write_groups(tmp_path / "empty.parquet", [])
    source = source_of(tmp_path)
    (split,) = source.cut(10)
    assert split.rows == 0
    assert read_all(source, [split]).table.schema == source.schema


def test_a_split_survives_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    (split,) = source_of(tmp_path).cut(10)
    assert Split.from_dict(split.to_dict()) == split


def test_a_row_group_of_no_rows_changes_nothing(tmp_path):
    write_groups(tmp_path / "a.parquet", [[], [1], [], [2, 3], []])
    source = source_of(tmp_path)
    assert read_all(source, source.cut(1)).table["id"].equals(pa.chunked_array([[1], [2], [3]]))
