"""Batches: every row in exactly one, none too large, and everything back in input order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.runtime.batching import by_length, cut, cut_groups, padded_width, to_arrow
from hfbatch.runtime.isolate import isolate

LENGTHS = st.lists(st.integers(0, 300), max_size=200).map(lambda found: np.array(found, np.int64))


@given(LENGTHS, st.integers(1, 70), st.one_of(st.none(), st.integers(1, 2000)), st.sampled_from([1, 8, 16]))
def test_batches_cover_all_rows_and_keep_the_budget(
    lengths: np.ndarray, size: int, tokens: int | None, multiple: int
) -> None:
    ordered = lengths[by_length(lengths)]
    bounds = cut(ordered, size, tokens, multiple)
    assert [k for start, stop in bounds for k in range(start, stop)] == list(range(len(lengths)))
    for start, stop in bounds:
        assert 1 <= stop - start <= size
        width = padded_width(int(ordered[start]), multiple)
        assert tokens is None or stop - start == 1 or (stop - start) * width <= tokens


@given(st.integers(1, 600), st.sampled_from([1, 8, 16, 64]))
def test_alignment_beyond_eight_adds_an_eighth_at_most(longest: int, multiple: int) -> None:
    width = padded_width(longest, multiple)
    assert width % min(multiple, 8) == 0
    assert 0 <= width - longest <= max(longest / 8, 7)
    if -longest % multiple <= longest / 8:
        assert width % multiple == 0


@given(LENGTHS, st.integers(1, 9))
def test_rows_of_one_length_stay_among_themselves(lengths: np.ndarray, size: int) -> None:
    ordered = lengths[by_length(lengths)]
    bounds = cut(ordered, size, alike=True)
    assert [k for start, stop in bounds for k in range(start, stop)] == list(range(len(lengths)))
    assert all(stop - start <= size and len(set(ordered[start:stop])) == 1 for start, stop in bounds)
    most = sum(-(-count // size) for count in np.unique(lengths, return_counts=True)[1])
    assert len(bounds) == most


@given(LENGTHS, st.integers(1, 9), st.integers(1, 5))
def test_batches_hold_rows_of_one_group(lengths: np.ndarray, size: int, kinds: int) -> None:
    groups = np.arange(len(lengths)) * 7 % kinds
    order = by_length(lengths, groups)
    batches = [
        order[start:stop] for start, stop in cut_groups(groups[order], lengths[order], size, None, 8, False)
    ]
    assert sorted(row for rows in batches for row in rows.tolist()) == list(range(len(lengths)))
    assert not len(lengths) or lengths[order[0]] == lengths.max()
    for rows in batches:
        assert len(rows) <= size
        assert len({*groups[rows].tolist()}) == 1
        assert (np.diff(lengths[rows]) <= 0).all()


@given(LENGTHS)
def test_ties_keep_the_input_order(lengths: np.ndarray) -> None:
    order = by_length(lengths)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    pairs = [(-lengths[k], k) for k in order]
    assert pairs == sorted(pairs)


def test_ragged_outputs_are_cut_to_their_lengths() -> None:
    outputs = {
        "tokens": np.array([[1, 2, 0], [3, 0, 0]]),
        "length": np.array([2, 1]),
        "pair": np.ones((2, 2)),
    }
    table = to_arrow(outputs, {"tokens": "length"})
    assert table["tokens"].to_pylist() == [[1, 2], [3]]
    assert pa.types.is_fixed_size_list(table.schema.field("pair").type)


@given(st.integers(1, 60), st.sets(st.integers(0, 59)))
def test_isolate_finds_exactly_the_bad_rows(count: int, bad: set[int]) -> None:
    def run(rows: np.ndarray) -> list[int]:
        if bad & set(rows.tolist()):
            raise ValueError("bad")
        return rows.tolist()

    results, failures = isolate(run, np.arange(count))
    assert [row for rows, _ in results for row in rows] == [row for row in range(count) if row not in bad]
    assert [row for row, _ in failures] == sorted(row for row in bad if row < count)


def test_a_fatal_error_is_not_blamed_on_rows() -> None:
    def run(rows: np.ndarray) -> None:
        raise KeyError("device")

    with pytest.raises(KeyError):
        isolate(run, np.arange(4), fatal=(KeyError,))
