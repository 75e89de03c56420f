"""Identical rows run through the model once, and each gets the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbatch.hub.models import pin
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.distinct import distinct, repeat
from hfbatch.runtime.predictor import BatchStats, Prediction
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import BatchSpec, ModelSpec

FLOATS = st.sampled_from([0.0, -0.0, 1.5, float("nan")])


def kinds_of(table: pa.Table) -> list[Any]:
    """Rows as Python compares their bits."""
    return [repr(row) for row in table.to_pylist()]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=3), FLOATS, st.sampled_from("ab")), max_size=30)
)
def test_rows_are_alike_if_all_their_features_are(rows: list[tuple[list[int], float, str]]) -> None:
    table = pa.table(
        {
            "input_ids": pa.array([row[0] for row in rows], pa.list_(pa.int32())),
            "scale": pa.array([row[1] for row in rows], pa.float32()),
            "name": pa.array([row[2] for row in rows], pa.string()),
        }
    )
    table = pa.concat_tables([table.slice(0, 3), table.slice(3)])  # in chunks, with offsets
    expected = kinds_of(table)
    found = distinct(table)
    if len(set(expected)) == len(expected):
        assert found is None
        return
    first, place = found
    assert [expected[k] for k in first] == list(dict.fromkeys(expected))
    assert [expected[first[k]] for k in place] == expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[[1]], [[1]]]),
        pa.array([[1, None], [1, None]]),
        pa.array([None, None], pa.int32()),
        pa.array([{"a": 1}, {"a": 1}]),
    ],
)
def test_features_of_other_types_are_not_compared(column: pa.Array) -> None:
    assert distinct(pa.table({"x": column})) is None


def test_lists_of_equal_bytes_and_other_lengths_differ() -> None:
    table = pa.table({"x": pa.array([[0, 0], [0], [], [0]], pa.list_(pa.int16()))})
    first, place = distinct(table)
    assert (first.tolist(), place.tolist()) == ([0, 1, 2], [0, 1, 2, 1])


def test_each_row_gets_the_result_or_the_error_of_its_kind() -> None:
    error = ValueError("bad")
    made = Prediction(pa.table({"y": [10, 30]}), np.array([0, 2]), [(1, error)], tokens=5)
    found = repeat(made, np.array([0, 1, 0, 2, 1]))
    assert found.outputs["y"].to_pylist() == [10, 10, 30]
    assert found.kept.tolist() == [0, 2, 3]
    assert found.failures == [(1, error), (4, error)]
    assert (found.repeated, found.tokens) == (2, 5)


@pytest.mark.parametrize("dedupe", [True, False])
def test_a_job_counts_the_rows_that_ran(encoder: str, dedupe: bool) -> None:
    counted: list[BatchStats] = []
    batch = BatchSpec(size=4, dedupe=dedupe)
    config = RunnerConfig("embedding", pin(ModelSpec(name=encoder)), {}, "float32", batch)
    runner = Runner(config, on_batch=counted.append)
    texts = ["a cat", "two dogs on a mat", "a cat", "one", "a cat", "one"]
    done = runner.run({"text": pa.array(texts)})
    vectors = done.columns["embedding"].to_pylist()
    assert (vectors[0] == vectors[2] == vectors[4]) or not dedupe
    assert done.stats.repeated == (3 if dedupe else 0)
    assert sum(stats.rows for stats in counted) == len(texts)
    alone = Runner(config).run({"text": pa.array(texts[1:2])}).columns["embedding"].to_pylist()
    np.testing.assert_allclose(vectors[1], alone[0], atol=1e-6)


def test_sampled_rows_are_never_alike(tmp_path: Any) -> None:
    from tests.models.text import tiny_llama

    params = {"do_sample": True, "max_new_tokens": 8, "temperature": 2.0}
    config = RunnerConfig(
        "text-generation", pin(ModelSpec(name=tiny_llama(tmp_path))), params, "float32", BatchSpec(size=4)
    )
    done = Runner(config).run({"text": pa.array(["Every"] * 6)})
    assert done.stats.repeated == 0
    assert len(set(done.columns["generated_text"].to_pylist())) > 1
