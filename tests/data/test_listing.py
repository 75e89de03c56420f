"""What an input path stands for: each file once, no output of hfbatch, and a word on what is left out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from fsspec.utils import glob_translate
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbatch.data.filesystem import open_filesystem, printable
from hfbatch.data.globs import Glob
from hfbatch.data.listing import partition_keys, reads
from hfbatch.data.walk import OUTPUT, list_files
from hfbatch.errors import SpecError
from hfbatch.output.ledger import Ledger
from hfbatch.spec.job import JobSpec
from tests.data.inputs import read_all, source_of, write_groups


def ids_of(path: Path | str, **options: object) -> list[int]:
    source = source_of(path, **options)
    return sorted(read_all(source, source.cut(1000)).table["id"].to_pylist())


def write_output(folder: Path, rows: list[int]) -> None:
    """What a job leaves: parts, and the file that says so."""
    write_groups(folder / "part-a-0000000000-000000000000-000000000000.parquet", [rows])
    Ledger(str(folder)).write_job({"spec": {}})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_groups(tmp_path / "data" / "a.parquet", [[1, 2]])
    write_groups(tmp_path / "data" / "sub" / "b.parquet", [[3]])
    return tmp_path / "data"


@pytest.mark.parametrize("below", ["", "/*", "/**", "/**/*.parquet", "/../data", "/*/../*"])
def test_an_output_inside_the_input_is_not_read(data, below):
    write_output(data / "out", [7, 8])
    assert ids_of(f"{data}{below}") == [1, 2, 3]
    assert source_of(f"{data}{below}").left_out == [
        "out (outputs of hfbatch, which are read only where they are input.path themselves)"
    ]


def test_links_to_an_output_are_links_to_an_output(data, tmp_path):
    write_output(tmp_path / "out", [7, 8])
    write_output(data / "out", [7, 8])
    (data / "there").symlink_to(tmp_path / "out")
    (data / "zhere").symlink_to("out")
    (data / "top").symlink_to(tmp_path)
    assert ids_of(data) == [1, 2, 3]
    assert source_of(data).left_out == [
        "out, there, zhere (outputs of hfbatch, which are read only where they are input.path themselves)",
        "top (links to a folder that holds the input)",
    ]


def test_an_output_without_its_job_is_an_output(data, tmp_path):
    write_output(data / "out", [7, 8])
    (data / "out" / "__hfbatch" / "job.json").rename(data / "out" / "__hfbatch" / "lock-00000001.json")
    for path in (str(data), f"local://{data}", f"{data}/**/*.parquet"):
        assert ids_of(path) == [1, 2, 3]
    store = pafs.SubTreeFileSystem(str(data), pafs.LocalFileSystem())  # not a local one for those who ask
    assert list_files(store, "").left_out == {"out": OUTPUT}


def test_an_output_may_be_the_input_of_the_next_job(data):
    write_output(data / "out", [7, 8])
    assert ids_of(data / "out") == [7, 8]
    assert ids_of(data / "out" / "part-*") == [7, 8]
    (data / "a.parquet").unlink()
    (data / "sub" / "b.parquet").unlink()
    with pytest.raises(SpecError, match=r"holds no files .*left out: out \(outputs of hfbatch"):
        source_of(data)


@pytest.mark.parametrize(
    ("path", "output", "inside"),
    [
        ("data", "data/out", True),
        ("data", "data", True),
        ("data/*", "data/out", True),
        ("data/**/*.parquet", "data/out", True),
        ("data/*.parquet", "data/out", False),
        ("data/s*/*.parquet", "data/out", False),
        ("data/s*/*.parquet", "data/sums", True),
        ("data/a.parquet", "data/out", False),
        ("data", "out", False),
        ("link", "data/out", True),
        ("link/*", "data/out", True),
        ("data", "link/out", True),
        ("other/../data", "data/out", True),
        ("away/../data", "data/out", False),
        ("file://{}/data", "data/out", True),
    ],
)
def test_whether_the_next_run_would_read_the_output(data, monkeypatch, path, output, inside):
    monkeypatch.chdir(data.parent)
    Path("link").symlink_to(data)
    Path("else/where").mkdir(parents=True)
    Path("away").symlink_to(Path("else/where").absolute())
    assert reads(path.format(data.parent), output) is inside


@pytest.mark.parametrize(
    ("path", "output", "inside"),
    [
        ("s3://lake/in", "s3://lake/in/out", True),
        ("s3://lake/in/", "s3://me:secret@lake/in/out?region=eu-west-1", True),
        ("s3://lake/in", "s3://lake/input/out", False),
        ("s3://lake/in", "s3://sea/in/out", False),
        ("memory://lake/*", "memory://lake/out", True),
        ("memory://lake/*.parquet", "memory://lake/out", False),
    ],
)
def test_whether_the_next_run_would_read_the_output_in_a_bucket(path, output, inside):
    assert reads(path, output) is inside


@pytest.mark.parametrize(
    ("link", "target", "why"),
    [
        ("loop", "..", "links to a folder that holds the input"),
        ("sub/loop", "..", "links to a folder that holds the input"),
        ("loop", "../..", "links to a folder that holds the input"),
        ("sub/self", ".", "links to what is read under another name"),
        ("again", "sub", "links to what is read under another name"),
        ("0.parquet", "a.parquet", "links to what is read under another name"),
        ("gone.parquet", "nowhere", "links that lead nowhere"),
        ("gone", "nowhere", "links that lead nowhere"),
        ("circle", "circle", "links that lead nowhere"),
    ],
)
def test_links_double_nothing_and_say_where_they_lead(data, link, target, why):
    (data / link).symlink_to("." if (link, target) == ("loop", "..") else target)
    source = source_of(data)
    assert [file.path for file in source.files] == ["a.parquet", "sub/b.parquet"]
    assert source.left_out == [f"{link} ({why})"]


def test_files_that_only_links_lead_to_are_read(data, tmp_path):
    write_groups(tmp_path / "else" / "deep" / "c.parquet", [[4]])
    write_groups(tmp_path / "else" / "d.parquet", [[5]])
    (tmp_path / "else" / "back").symlink_to(data)
    (data / "there").symlink_to(tmp_path / "else")
    (data / "there2").symlink_to(tmp_path / "else")
    (data / "d.parquet").symlink_to(tmp_path / "else" / "d.parquet")
    source = source_of(data)
    assert ids_of(data) == [1, 2, 3, 4, 5]
    assert [file.path for file in source.files] == [
        "a.parquet",
        "d.parquet",
        "sub/b.parquet",
        "there/deep/c.parquet",
    ]
    assert ids_of(data / "there*" / "deep" / "*") == [4]
    assert ids_of(data / "there2") == [1, 2, 3, 4, 5]
    # A glob that only a link's name matches reads what it leads to, though its own name would come first.
    (data / "latest").symlink_to("sub")
    assert ids_of(data / "late*") == [3]
    assert ids_of(data / "**" / "latest" / "*.parquet") == [3]


def test_many_links_to_one_another_end_soon(tmp_path):
    for name in range(8):
        write_groups(tmp_path / str(name) / "a.parquet", [[name]])
        for other in range(8):
            (tmp_path / str(name) / f"to{other}").symlink_to(f"../{other}")
    assert ids_of(tmp_path) == list(range(8))
    assert ids_of(tmp_path / "**" / "*.parquet") == list(range(8))


def test_a_file_with_two_names_is_read_once_but_for_each_partition(tmp_path):
    write_groups(tmp_path / "day=1" / "a.parquet", [[1]])
    os.link(tmp_path / "day=1" / "a.parquet", tmp_path / "day=1" / "b.parquet")
    (tmp_path / "day=2").mkdir()
    os.link(tmp_path / "day=1" / "a.parquet", tmp_path / "day=2" / "a.parquet")
    source = source_of(tmp_path)
    rows = read_all(source, source.cut(1000))
    assert rows.table["day"].to_pylist() == [1, 2]
    assert source.left_out == ["day=1/b.parquet (other names of a file that is read)"]


def test_files_without_an_ending_are_parquet_if_they_begin_as_such(data):
    for name in ("000001_0", "data.0", "sub/part-00000"):
        write_groups(data / name, [[int.from_bytes(name.encode()[-2:])]])
    (data / "LICENSE").write_text("yours")
    (data / "notes.txt").write_text("mine")
    write_groups(data / "a.parquet.bak", [[9]])
    for chosen in ("auto", "parquet"):
        source = source_of(data, format=chosen)
        assert [file.path for file in source.files] == [
            "000001_0", "a.parquet", "data.0", "sub/b.parquet", "sub/part-00000",
        ]  # fmt: skip
        assert source.left_out == [
            "LICENSE, a.parquet.bak, notes.txt (of no format that is read, by their names)"
        ]
    for name in ("a.parquet", "sub/b.parquet"):
        (data / name).unlink()
    assert len(ids_of(data)) == 3


def test_a_pipe_is_left_out_and_not_waited_for(data):
    os.mkfifo(data / "c.parquet")
    assert ids_of(data) == [1, 2, 3]
    assert source_of(data).left_out == ["c.parquet (neither files nor folders)"]


def test_a_name_that_is_not_utf8_is_a_split_with_a_fault(data):
    os.rename(data / "a.parquet", os.fsencode(data) + b"/caf\xe9.parquet")
    source = source_of(data)
    (broken,) = [split for split in source.cut(1000) if split.fault]
    assert broken.fault == r"caf\xe9.parquet cannot be read: its name is not UTF-8; rename it"
    assert sum(split.rows for split in source.cut(1000)) == 1
    for split in source.cut(1000):
        assert split.part.isascii()
    os.rename(os.fsencode(data) + b"/caf\xe9.parquet", os.fsencode(data) + b"/\xe9")
    path = os.fsdecode(os.fsencode(data) + b"/\xe9")
    with pytest.raises(SpecError, match=r"input\.path: .*\\udce9' is not UTF-8; rename it"):
        JobSpec.build({"task": "embedding", "model": "m", "input": path, "output": "o"})
    with pytest.raises(SpecError, match=r"\\xe9 is not UTF-8"):
        open_filesystem(path)
    with pytest.raises(SpecError, match=r"does not exist \(there is: sub, \\xe9\)"):
        source_of(data / "absent")


def test_only_ascii_digits_make_a_partition_a_number(tmp_path):
    write_groups(tmp_path / "n=٣" / "m=3" / "a.parquet", [[1]])
    source = source_of(tmp_path)
    assert read_all(source, source.cut(10)).table.to_pydict() == {
        "id": [1],
        "text": ["text 1"],
        "n": ["٣"],
        "m": [3],
    }


def test_a_partition_value_whose_escapes_are_no_text_stays_as_it_is():
    assert partition_keys("a=%FF/b=%41/c=1%/x") == {"a": "%FF", "b": "A", "c": "1%"}


@pytest.mark.parametrize("pattern", ["a**", "***"])
def test_a_pattern_that_means_nothing_is_reported(data, pattern):
    with pytest.raises(SpecError, match="is no pattern"):
        source_of(data / pattern)


NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & {0, ord("/")})
"""What any name of a file can begin with."""


@settings(max_examples=50, deadline=None)
@given(folder=NAMES, names=st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_a_file_of_any_name_is_read_once_or_named(tmp_path_factory, folder, names):
    above = tmp_path_factory.mktemp("names")
    base = os.path.join(os.fsencode(above), b"f" + folder)
    os.mkdir(base)
    for number, name in enumerate(names):
        write_groups(above / "new", [[number]])
        os.rename(above / "new", os.path.join(base, name + b".parquet"))
    write_groups(above / "z.parquet", [[-1]])
    data = {n for n, name in enumerate(names) if name[:1] not in b"._" or (name[:1] == b"_" and b"=" in name)}
    source = source_of(above)
    splits = source.cut(1000)
    read = read_all(source, [split for split in splits if not split.fault]).table["id"].to_pylist()
    assert len(read) == len(set(read))
    assert set(read) <= data | {-1}
    assert len(read) + len(source.broken) == len(data) + 1
    assert all("its name is not UTF-8; rename it" in split.fault for split in splits if split.fault)
    assert all(split.part.isascii() for split in splits)
    "".join(split.fault or "" for split in splits).encode()
    alone = os.fsdecode(base)
    if printable(alone) == alone and set(read) > {-1}:
        assert len(source_of(alone).files) == len(data)


PARTS = st.lists(st.sampled_from(["a", "b", "ab", "*", "a*", "?", "[!a]", "**"]), min_size=1, max_size=4)
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "c d", "**"]), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(parts=PARTS, names=PATHS)
def test_a_glob_matches_what_that_of_fsspec_does_and_what_lies_below(parts, names):
    pattern, glob = re.compile(glob_translate("/".join(parts))), Glob("/".join(parts))
    there = any(pattern.match("/".join(names[:count])) for count in range(1, len(names) + 1))
    assert glob.accepts(glob.walk("/".join(names))) is there
    assert not there or glob.walk("/".join(names[:-1]))
