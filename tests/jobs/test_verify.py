"""`hfbatch verify` finds what is wrong with an output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfbatch.data.splits import Piece, Split
from hfbatch.predict.verify import computed_columns, doubled, verify_output
from tests.jobs.here import job_here
from tests.jobs.tools import call, make_spec, part_names, sentences, write_shards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder: str) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_shards(folder / "in", [*sentences(30, most=1), None])
    spec = make_spec(
        "embedding",
        encoder,
        folder / "in",
        folder / "out",
        input={"split_rows": 10},
        rejects={"max_fraction": 0.1},
    )
    assert job_here(spec).exit_code == 0
    assert verify_output(str(folder / "out")) == []
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the output, and of the input with its times, to spoil."""
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copytree(finished / "in", tmp_path / "in", copy_function=shutil.copy2)
    return tmp_path


def check(copy: Path) -> str:
    return "\n".join(verify_output(str(copy / "out"), str(copy / "in")))


def check_by_command(copy: Path) -> tuple[int, list[str]]:
    done = call("verify", str(copy / "out"), "--input", str(copy / "in"), "--json")
    return done.exit_code, json.loads(done.stdout)["faults"]


def test_an_untouched_copy_is_well(copy: Path) -> None:
    assert check(copy) == ""
    assert check_by_command(copy) == (0, [])


def test_a_deleted_part(copy: Path) -> None:
    victim = part_names(copy / "out")[1]
    (copy / "out" / victim).unlink()
    assert "its part is missing" in check(copy)
    code, faults = check_by_command(copy)
    assert code == 1
    assert "\n".join(faults) == check(copy)


def test_rows_cut_off(copy: Path) -> None:
    victim = copy / "out" / part_names(copy / "out")[0]
    table = pq.read_table(victim)
    pq.write_table(table.slice(0, 4), victim)
    assert "holds 4 rows" in check(copy)


def test_a_part_cut_off_in_the_middle(copy: Path) -> None:
    victim = copy / "out" / part_names(copy / "out")[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    assert "cannot be read" in check(copy)


def test_a_part_of_another_job(copy: Path) -> None:
    names = part_names(copy / "out")
    victim = copy / "out" / names[0]
    table = pq.read_table(victim)
    footer = json.loads(table.schema.metadata[b"hfbatch"])
    stamped = {b"hfbatch": json.dumps({**footer, "fingerprint": "0" * 32}).encode()}
    pq.write_table(table.replace_schema_metadata(stamped), victim)
    shutil.copy(
        copy / "out" / names[1],
        copy / "out" / names[1].replace("shard", "stray").replace(names[1][-15:-8], "0000000"),
    )
    found = check(copy)
    assert "is of another job" in found
    assert "belongs to no split" in found or "the input has changed" in found


def spoil(path: Path, change: Callable[[pa.Table, dict[str, Any]], pa.Table]) -> None:
    """Writes a part again: another table, a footer that was changed in place."""
    table = pq.read_table(path)
    footer = json.loads(table.schema.metadata[b"hfbatch"])
    table = change(table, footer)
    pq.write_table(table.replace_schema_metadata({b"hfbatch": json.dumps(footer).encode()}), path)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_no_number(copy: Path, number: float) -> None:
    def poison(table: pa.Table, _: dict[str, Any]) -> pa.Table:
        vectors = table["embedding"].combine_chunks()
        values = vectors.values.to_numpy().copy()
        values[3 * vectors.type.list_size + 1] = number
        poisoned = pa.FixedSizeListArray.from_arrays(pa.array(values), type=vectors.type)
        return table.set_column(
            table.column_names.index("embedding"), table.schema.field("embedding"), poisoned
        )

    victim = copy / "out" / part_names(copy / "out")[0]
    spoil(victim, poison)
    assert f"{victim.name}: 'embedding' is NaN or infinite in 1 rows, first in row 3" in check(copy)


def test_only_what_the_task_computed_is_to_be_finite(copy: Path) -> None:
    job = json.loads((copy / "out/__hfbatch/job.json").read_text())
    assert computed_columns(job) == ["embedding"]
    job["identity"]["output"] = {"keep": ["id"], "prefix": "", "truncated": "text"}
    assert computed_columns(job) == ["embedding"]


def test_a_part_that_is_a_copy_of_another(copy: Path) -> None:
    names = part_names(copy / "out")
    shutil.copy(copy / "out" / names[0], copy / "out" / names[1])
    found = check(copy)
    assert f"{names[1]} is a copy of {names[0]}" in found
    assert "is read twice" in found


def test_an_input_file_that_two_parts_read(copy: Path) -> None:
    names = part_names(copy / "out")
    first = Split.from_dict(json.loads(pq.read_schema(copy / "out" / names[0]).metadata[b"hfbatch"])["split"])

    def as_the_first(table: pa.Table, footer: dict[str, Any]) -> pa.Table:
        footer["split"]["pieces"][0] = {**asdict(first.pieces[0]), "start": 5, "stop": 11}
        return table

    spoil(copy / "out" / names[1], as_the_first)
    file = first.pieces[0].file
    assert (
        f"the input file {file} is read twice: its rows 5 to 6 are in {names[0]} and in {names[1]}"
        in check(copy)
    )


def test_an_input_file_that_is_read_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.parquet").symlink_to("a.parquet")
    a, b = Piece("a.parquet", 0, 10, 1, 0), Piece("b.parquet", 0, 10, 1, 0)
    (fault,) = doubled([("part-1", [a]), ("part-2", [b])], str(tmp_path))
    assert "the input file a.parquet is read twice, by its other name b.parquet" in fault
    rest = replace(a, start=10, stop=20)
    assert doubled([("part-1", [a, rest]), ("part-2", [replace(a, start=20, stop=20)])], str(tmp_path)) == []


def test_a_changed_input(copy: Path) -> None:
    victim = sorted((copy / "in").iterdir())[0]
    table = pq.read_table(victim)
    pq.write_table(table.slice(0, len(table) - 1), victim)
    found = check(copy)
    assert "its part is missing" in found
    assert "the input has changed" in found or "belongs to no split" in found


def test_lost_rejects(copy: Path) -> None:
    for file in (copy / "out/__hfbatch/rejects").iterdir():
        file.unlink()
    assert "rejects" in check(copy)


def test_rejects_of_no_part(copy: Path) -> None:
    (rejects,) = (copy / "out/__hfbatch/rejects").iterdir()
    shutil.copy(rejects, rejects.with_name(rejects.name.replace("part-", "part-0")))
    assert "belong to no part" in check(copy)


def test_a_rerun_reports_a_part_that_cannot_be_read_and_then_mends_it(
    finished: Path, tmp_path: Path, encoder: str
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    spec = make_spec(
        "embedding", encoder, finished / "in", tmp_path / "out", input={"split_rows": 10}, rejects={"max_fraction": 0.1}
    )  # fmt: skip
    victim = tmp_path / "out" / part_names(tmp_path / "out")[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    (tmp_path / "out/__hfbatch/manifests.PARQUET").unlink()
    for _ in range(2):
        result = job_here(spec)
        assert result.exit_code == 1
        assert f"{victim.name} cannot be read" in result.message
        assert not (tmp_path / "out/_SUCCESS").exists()
    victim.unlink()
    assert job_here(spec).exit_code == 0
    assert verify_output(str(tmp_path / "out")) == []
