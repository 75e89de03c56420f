"""Who gets what: a job never asks for more than there is, and never waits for itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.cluster.resources import lay_out
from hfbatch.errors import SpecError
from hfbatch.runtime.machine import Node
from hfbatch.spec.job import WorkersSpec

CPU_NODES = st.lists(
    st.builds(Node, st.sampled_from([1.0, 2.0, 4.0, 16.0, 64.0]), st.just(0.0)), min_size=1, max_size=5
)


def fits(workers: int, cpus: float, nodes: list[Node]) -> bool:
    return sum(int(node.cpus / cpus + 1e-9) for node in nodes) >= workers


@given(CPU_NODES)
def test_auto_always_fits_and_leaves_room_to_read(nodes: list[Node]) -> None:
    layout = lay_out(WorkersSpec(), nodes)
    total = sum(node.cpus for node in nodes)
    assert layout.workers >= 1
    assert fits(layout.workers, layout.cpus, nodes)
    assert layout.workers * layout.cpus + max(layout.read_cpus, layout.write_cpus) <= total + 1e-6
    assert layout.read_cpus != layout.write_cpus


@given(CPU_NODES, st.integers(1, 20))
def test_a_given_count_fits_or_is_a_clear_fault(nodes: list[Node], count: int) -> None:
    try:
        layout = lay_out(WorkersSpec(count=count), nodes)
    except SpecError as error:
        assert "do not fit into the cluster" in str(error)  # noqa: PT017
    else:
        assert layout.workers == count
        assert fits(count, layout.cpus, nodes)
        assert count * layout.cpus + layout.read_cpus <= sum(node.cpus for node in nodes) + 1e-6


def test_one_worker_takes_a_small_machine_and_big_ones_get_several() -> None:
    assert lay_out(WorkersSpec(), [Node(2, 0)]).workers == 1
    assert lay_out(WorkersSpec(), [Node(64, 0)]).workers == 7


def test_every_gpu_gets_a_worker() -> None:
    layout = lay_out(WorkersSpec(), [Node(4, 0), Node(16, 4), Node(16, 4)])
    assert (layout.workers, layout.gpus) == (8, 1.0)


def test_an_autoscaler_may_bring_what_is_not_there_yet() -> None:
    spec = WorkersSpec(count=8, gpus=1)
    with pytest.raises(SpecError, match="the cluster has 0 GPUs"):
        lay_out(spec, [Node(4, 0)])
    assert lay_out(spec, [Node(4, 0)], ceiling=Node(68, 8)).workers == 8


def test_too_much_is_reported_with_what_there_is() -> None:
    with pytest.raises(SpecError, match="2 nodes, 6 CPUs, 0 GPUs"):
        lay_out(WorkersSpec(count=3, cpus=4), [Node(2, 0), Node(4, 0)])
