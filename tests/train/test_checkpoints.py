"""Checkpoints count when they are whole, and the newest whole one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfbatch.train.loop.checkpoints import MANIFEST, Checkpoints


def save(store: Checkpoints, folder: Path, step: int) -> None:
    here = folder / f"local-{step}"
    (here / "inner").mkdir(parents=True)
    (here / "model.safetensors").write_bytes(bytes([step]) * 1000)
    (here / "inner" / "state").write_text(f"state of {step}")
    store.commit(step, store.upload(here, step, ["model.safetensors", "inner/state"]))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    if request.param == "s3":
        return Checkpoints(f"s3://{request.getfixturevalue('s3')['bucket']}/checkpoints")
    return Checkpoints(str(tmp_path / "checkpoints"))


def test_the_newest_one_comes_back_as_it_was(store: Checkpoints, tmp_path: Path) -> None:
    assert store.newest(tmp_path / "none") is None
    for step in (5, 10):
        save(store, tmp_path, step)
    step, folder = store.newest(tmp_path / "found") or (0, tmp_path)
    assert step == 10
    assert (folder / "model.safetensors").read_bytes() == bytes([10]) * 1000
    assert (folder / "inner" / "state").read_text() == "state of 10"


def test_one_without_a_manifest_is_none(store: Checkpoints, tmp_path: Path) -> None:
    save(store, tmp_path, 5)
    store.upload(tmp_path / "local-5", 10, ["model.safetensors"])
    assert store.steps() == [5]


@pytest.mark.parametrize("damage", ["cut off", "changed", "gone"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    store = Checkpoints(str(tmp_path / "checkpoints"))
    for step in (5, 10):
        save(store, tmp_path, step)
    victim = Path(store.path(10)) / "model.safetensors"
    match damage:
        case "cut off":
            victim.write_bytes(victim.read_bytes()[:500])
        case "changed":
            victim.write_bytes(bytes([11]) * 1000)
        case "gone":
            victim.unlink()
    step, _ = store.newest(tmp_path / "found") or (0, tmp_path)
    assert step == 5


def test_the_newest_and_the_best_stay(store: Checkpoints, tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(store, tmp_path, step)
    store.prune(newest=20, keep=1, best=10)
    assert store.steps() == [10, 20]


def test_those_after_the_newest_go(store: Checkpoints, tmp_path: Path) -> None:
    """They were damaged, or training would have gone on from them; they must not push out what is whole."""
    for step in (5, 10, 15):
        save(store, tmp_path, step)
    store.prune(newest=10, keep=1, best=None)
    assert store.steps() == [10]


def test_what_did_not_arrive_whole_is_not_committed(store: Checkpoints, tmp_path: Path) -> None:
    save(store, tmp_path, 5)
    sums = store.upload(tmp_path / "local-5", 10, ["model.safetensors"])
    with pytest.raises(OSError, match=r"inner/state has 0 bytes in place of 10"):
        store.commit(10, {**sums, "inner/state": (10, "")})
    assert store.steps() == [5]


def test_a_damaged_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path / "checkpoints"))
    save(store, tmp_path, 5)
    (Path(store.path(5)) / MANIFEST).write_text('{"files": ')
    assert store.newest(tmp_path / "found") is None
