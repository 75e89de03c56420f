"""`hfbatch verify` finds what is wrong with an output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import hfbatch
from hfbatch.verify import verify_output
from tests.jobs.tools import call, make_spec, part_names, sentences, write_shards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoder: str, ray_cluster: str) -> Path:
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
    assert hfbatch.run(spec, quiet=True).exit_code == 0
    assert verify_output(str(folder / "out")) == []
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the output, and of the input with its times, to spoil."""
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copytree(finished / "in", tmp_path / "in", copy_function=shutil.copy2)
    return tmp_path


def check(copy: Path) -> str:
    faults = verify_output(str(copy / "out"), str(copy / "in"))
    done = call("verify", str(copy / "out"), "--input", str(copy / "in"), "--json")
    assert done.exit_code == (1 if faults else 0)
    assert json.loads(done.stdout)["faults"] == faults
    return "\n".join(faults)


def test_an_untouched_copy_is_well(copy: Path) -> None:
    assert check(copy) == ""


def test_a_deleted_part(copy: Path) -> None:
    victim = part_names(copy / "out")[1]
    (copy / "out" / victim).unlink()
    assert "its part is missing" in check(copy)


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


def test_a_changed_input(copy: Path) -> None:
    victim = sorted((copy / "in").iterdir())[0]
    table = pq.read_table(victim)
    pq.write_table(table.slice(0, len(table) - 1), victim)
    found = check(copy)
    assert "its part is missing" in found
    assert "the input has changed" in found or "belongs to no split" in found


def test_lost_rejects(copy: Path) -> None:
    for file in (copy / "out/_hfbatch/rejects").iterdir():
        file.unlink()
    assert "rejects" in check(copy)


def test_rejects_of_no_part(copy: Path) -> None:
    (rejects,) = (copy / "out/_hfbatch/rejects").iterdir()
    shutil.copy(rejects, rejects.with_name(rejects.name.replace("part-", "part-0")))
    assert "belong to no part" in check(copy)


def test_a_rerun_tells_a_part_that_cannot_be_read_and_then_mends_it(
    finished: Path, tmp_path: Path, encoder: str
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    spec = make_spec(
        "embedding", encoder, finished / "in", tmp_path / "out", input={"split_rows": 10}, rejects={"max_fraction": 0.1}
    )  # fmt: skip
    victim = tmp_path / "out" / part_names(tmp_path / "out")[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    (tmp_path / "out/_hfbatch/manifests.parquet").unlink()
    for _ in range(2):
        result = hfbatch.run(spec, quiet=True)
        assert result.exit_code == 1
        assert f"{victim.name} cannot be read" in result.message
        assert not (tmp_path / "out/_SUCCESS").exists()
    victim.unlink()
    assert hfbatch.run(spec, quiet=True).exit_code == 0
    assert verify_output(str(tmp_path / "out")) == []
