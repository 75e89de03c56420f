"""The training processes fit onto the nodes that there are, or it is told at once that they do not."""

from __future__ import annotations

import os
import queue
import time
from pathlib import Path
from typing import Any

import pytest

from hfbatch.errors import SpecError, WorkerError
from hfbatch.runtime.machine import Node
from hfbatch.spec.finetune import TrainWorkersSpec
from hfbatch.train import worker_group
from hfbatch.train.features import over_splits
from hfbatch.train.plan import make_finetune_plan
from hfbatch.train.worker_group import Board, WorkerGroup, choose_worker_group, waiting
from tests.train.tools import spec_of, write_rows

CPUS, GPUS = [Node(8, 0), Node(8, 0)], [Node(8, 1), Node(8, 1)]


@pytest.mark.parametrize(
    ("nodes", "wanted", "team"),
    [
        ([Node(2, 0)], {}, WorkerGroup(1, 0, 2, 1)),
        (CPUS, {}, WorkerGroup(1, 0, 8, 1)),  # a process is on one node
        (CPUS, {"count": 2}, WorkerGroup(2, 0, 8, 2)),
        (CPUS, {"count": 3}, WorkerGroup(3, 0, 4, 3)),
        ([Node(4, 0)] * 3, {"count": 2}, WorkerGroup(2, 0, 4, 2)),
        ([Node(8, 0), Node(2, 0)], {"count": 2}, WorkerGroup(2, 0, 4, 2)),
        ([Node(8, 0)], {"at_least": 4}, WorkerGroup(4, 0, 2, 4)),
        (GPUS, {}, WorkerGroup(2, 1, 1, 2)),
        ([Node(8, 4)], {"count": 4, "at_least": 1, "cpus": 2}, WorkerGroup(4, 1, 2, 1)),
        ([Node(2, 4)], {}, WorkerGroup(2, 1, 1, 2)),  # each process needs a CPU too
    ],
)
def test_processes_get_what_a_node_has(nodes: list[Node], wanted: dict[str, Any], team: WorkerGroup) -> None:
    assert choose_worker_group(TrainWorkersSpec(**wanted), nodes) == team


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        (CPUS, {"cpus": 16}),
        (GPUS, {"gpus": 2}),
        (CPUS, {"gpus": 1}),
        (GPUS, {"count": 3}),
        (CPUS, {"count": 17}),
    ],
)
def test_processes_that_no_node_can_take_are_refused(nodes: list[Node], wanted: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"do not fit into the cluster .* each process on one"):
        choose_worker_group(TrainWorkersSpec(**wanted), nodes)


def test_gpus_that_an_autoscaler_may_add_are_asked_for() -> None:
    head, most = [Node(4, 0)], Node(68, 8)
    assert choose_worker_group(TrainWorkersSpec(count=4, gpus=1), head, most) == WorkerGroup(4, 1, 1, 4)
    assert choose_worker_group(TrainWorkersSpec(), head, most).workers == 8
    with pytest.raises(SpecError, match="9 of 1 CPUs and 1 GPUs do not fit"):
        choose_worker_group(TrainWorkersSpec(count=9), head, most)


def test_a_process_that_dies_over_its_rows_ends_the_training_with_a_sentence(
    ray_cluster: str, encoder: str, tmp_path: Path
) -> None:
    plan = make_finetune_plan(spec_of(write_rows(tmp_path), encoder, tmp_path / "out"))
    with pytest.raises(WorkerError, match=r"a process died while it read rows: .* fewer than 120"):
        over_splits(plan.train.splits[:1], lambda number, split: os._exit(1))


def test_processes_that_wait_for_the_cluster_are_reported(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.util import placement_group, remove_placement_group

    team, said = WorkerGroup(2, 0.0, 64.0, 2), queue.Queue[str]()
    assert waiting(team) == ""
    group = placement_group([team.size] * team.workers)
    try:
        while not waiting(team):  # until Ray has heard of it
            time.sleep(0.05)
        monkeypatch.setattr(worker_group, "WAIT_S", 0)
        board = Board.remote()  # type: ignore[attr-defined]
        follower = worker_group._Follower(board, team, lambda news: None, said.put)
        follower.start()
        text = said.get(timeout=60)
        follower.close()
        ray.kill(board)
        assert text.startswith("waiting for 2 processes of 64 CPUs each; free in the cluster: ")
        assert not follower.wrong
    finally:
        remove_placement_group(group)
    while waiting(team):
        time.sleep(0.05)
