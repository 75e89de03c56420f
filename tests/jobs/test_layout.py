"""An output is a dataset for every reader, also one that the version before began."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from hfbatch import JobSpec
from hfbatch.errors import OutputHeldError
from hfbatch.output import earlier
from hfbatch.output.layout import INNER, JOB, OLD_INNER, REJECTS, REPORT, REPORT_PAGE, SUCCESS
from hfbatch.output.lock import hold
from hfbatch.predict.plan import make_plan
from hfbatch.predict.status import read_report, read_status
from hfbatch.predict.verify import verify_output
from tests.jobs.here import job_here
from tests.jobs.tools import make_spec, part_stamps, read_output, read_rejects
from tests.output.test_lock import leave

EARLIER = Path(__file__).parent / "fixtures" / "earlier-output"
"""Input and output of a job, made by the version before, which kept all but the rows in `_hfbatch`."""


def ids(column: Iterable[int]) -> list[int]:
    return sorted(column)


def all_sets(found: datasets.DatasetDict) -> list[int]:
    assert set(found) == {"train"}  # what is not told apart comes under this name
    return ids(found["train"]["id"])


READERS: dict[str, Callable[[str], list[int]]] = {
    "pyarrow": lambda out: ids(ds.dataset(out, format="parquet").to_table()["id"].to_pylist()),
    "pandas": lambda out: ids(pd.read_parquet(out)["id"]),
    "duckdb": lambda out: ids(duckdb.sql(f"FROM '{out}/*.{ending(out)}'").df()["id"]),
    "duckdb **": lambda out: ids(duckdb.sql(f"FROM read_parquet('{out}/**/*.{ending(out)}', union_by_name = true)").df()["id"]),
    "polars": lambda out: ids(pl.read_parquet(f"{out}/*.{ending(out)}")["id"]),
    "polars **": lambda out: ids(pl.scan_parquet(f"{out}/**/*.{ending(out)}").collect()["id"]),
    "datasets": lambda out: all_sets(datasets.load_dataset("parquet", data_dir=out)),
}  # fmt: skip
"""The ids that each reader finds in a folder; tests/jobs/test_job.py has Ray's."""


def ending(out: str) -> str:
    return "PARQUET" if REJECTS in out else "parquet"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, encoder: str) -> str:
    """An output with all that may lie in one: parts with and without rows, named train and otherwise, rejects, files of
    a run that writes, and one that was killed."""
    folder = tmp_path_factory.mktemp("readers")
    texts = {"train-00000": ["a", None, "b"], "more": ["c", "d"], "nulls": [None]}
    (folder / "in").mkdir()
    for first, (name, column) in enumerate(texts.items()):
        table = pa.table(
            {"id": range(10 * first, 10 * first + len(column)), "text": pa.array(column, pa.string())}
        )
        pq.write_table(table, folder / "in" / f"{name}.parquet")
    spec = make_spec(
        "embedding",
        encoder,
        folder / "in",
        folder / "out",
        input={"split_rows": 2},
        rejects={"max_fraction": 0.9},
    )
    assert job_here(spec).exit_code == 0
    leave(folder / "out")
    for place in ("", INNER, REJECTS):
        (folder / "out" / place / ".part-a.parquet.1.hfbatch-tmp").write_bytes(b"cut o")
    return str(folder / "out")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_the_rows_alone_and_the_rejects_where_they_are_named(
    out: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert READERS[reader](out) == [0, 2, 10, 11]
    for path in Path(out, REJECTS).glob(".*"):
        path.rename(tmp_path / path.name)
    assert READERS[reader](f"{out}/{REJECTS}") == [1, 20]


def test_a_folder_is_a_dataset_of_the_hub(out: str, tmp_path: Path) -> None:
    assert all_sets(datasets.load_dataset(out, cache_dir=str(tmp_path))) == [0, 2, 10, 11]


def test_polars_reads_a_folder_right_or_asks_for_a_glob(out: str) -> None:
    """It reads all files below a folder, whatever their names: none but the rows may be there for it."""
    try:
        assert READERS["polars"](out) == ids(pl.read_parquet(out)["id"])
    except pl.exceptions.InvalidOperationError as error:
        assert "use a glob pattern" in str(error)  # noqa: PT017


def test_spark_hides_every_name_but_those_of_parts(out: str) -> None:
    for path in Path(out).rglob("*"):
        top = path.relative_to(out).parts[0]
        assert top[0] in "_." or (top.startswith("part-") and top.endswith(".parquet"))
    there = {str(path.relative_to(out)) for path in Path(out).rglob("*")}
    assert {SUCCESS, JOB, REPORT, REPORT_PAGE, REJECTS} <= there


@pytest.fixture
def before(tmp_path: Path, minilm: str) -> JobSpec:
    """The job of an output of the version before."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "in").iterdir():
        os.utime(file, ns=(1_700_000_000_000_000_000,) * 2)
    return make_spec(
        "embedding", minilm, tmp_path / "in", tmp_path / "out",
        input={"split_rows": 3}, output={"keep": ["id"]}, rejects={"max_fraction": 0.5},
    )  # fmt: skip


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_output_of_the_version_before_is_continued(before: JobSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows, old = read_output(out), {name.lower(): stamp for name, stamp in part_stamps(out).items()}
    assert read_status(str(out))["rows_out"] == 4  # commands that write nothing read it as it is
    assert read_report(str(out))["rows"]["rejected"] == 1
    assert verify_output(str(out), str(tmp_path / "in")) == []
    assert make_plan(before).todo == []
    (out / OLD_INNER / ".job.json.1.hfbatch-tmp").touch()

    result = job_here(before)
    assert (result.exit_code, result.message) == (0, "Nothing was left to do: 4 rows in 2 parts, 1 reject.")
    assert not (out / OLD_INNER).exists()
    assert {name.lower(): stamp for name, stamp in part_stamps(out).items()} == old
    assert read_output(out).equals(rows)
    assert [row["id"] for row in read_rejects(out)] == [2]
    assert verify_output(str(out), str(tmp_path / "in")) == []
    assert all_sets(datasets.load_dataset("parquet", data_dir=str(out), cache_dir=str(tmp_path / "cache"))) == [
        0, 1, 3, 4,
    ]  # fmt: skip

    (lost,) = out.glob("part-more-*")
    lost.unlink()
    assert job_here(before).message == "Done: 4 rows in 2 parts, 1 reject."
    assert read_output(out)["id"].equals(rows["id"])


def test_a_move_that_is_killed_anywhere_is_completed(
    before: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    shutil.copytree(out, tmp_path / "whole")
    with hold(str(tmp_path / "whole"), print):
        pass
    wanted, left = files(tmp_path / "whole"), [0]
    move = earlier._move

    def killed(*arguments: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        move(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(earlier, "_move", killed)
        for left[0] in (0, 1, 1, 1, 1):
            with pytest.raises(KeyboardInterrupt), hold(out, print):
                pass
            assert read_status(out)["rows_out"] == 4
    with hold(out, print):
        pass
    assert files(Path(out)) == wanted


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_of_the_version_before_holds_its_output(before: JobSpec, tmp_path: Path, alive: bool) -> None:
    out = tmp_path / "out"
    leave(out, folder=OLD_INNER, **({} if alive else {"pid": 2**22 + 1}))
    there = files(out)
    if alive:
        assert read_status(str(out))["running"]["pid"] == os.getpid()
        with pytest.raises(OutputHeldError, match="is being written by"), hold(str(out), print):
            pass
        assert files(out) == there
    else:
        with hold(str(out), print):
            assert not (out / OLD_INNER).exists()
