"""Each row once an epoch, in an order that seed and epoch decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.train.loop.sampler import NO_ROW, ShuffledRows


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=300),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 5),
)
def test_every_row_once_in_whole_steps(lengths: list[int], step: int, by_length: bool, epoch: int) -> None:
    sampler = ShuffledRows(np.array(lengths), step, 7, by_length)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % step == 0
    first = epoch * len(lengths)
    assert sorted(row for row in order if row != NO_ROW) == list(range(first, first + len(lengths)))
    assert order == list(sampler)


@pytest.mark.parametrize("by_length", [True, False])
def test_epochs_differ(by_length: bool) -> None:
    sampler = ShuffledRows(np.random.default_rng(0).integers(1, 100, 500), 8, 0, by_length)
    first = list(sampler)
    sampler.set_epoch(1)
    second = [number - 500 for number in sampler if number != NO_ROW]
    assert sorted(second) == list(range(500))
    assert second != first[:500]


def test_rows_of_a_step_have_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 1600)
    padding = {}
    for by_length in (True, False):
        order = np.array(list(ShuffledRows(lengths, 16, 0, by_length)))
        steps = lengths[order].reshape(-1, 16)
        padding[by_length] = 1 - steps.sum() / (steps.max(axis=1) * 16).sum()
    assert padding[True] < 0.05 < 0.4 < padding[False]
