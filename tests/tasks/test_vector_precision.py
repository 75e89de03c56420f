"""Vectors in fewer bytes equal those of sentence-transformers, with ranges that a job takes once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from hfbatch import JobSpec
from hfbatch.hub.models import pin
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.serve.openai import answers_with
from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.vector_precision import STORED, fit_ranges, store
from tests.models.text import CORPUS
from tests.tasks.drive import make, measured, run
from tests.tasks.test_embedding import encoder as encoder
from tests.tasks.test_embedding import vectors

TEXTS = [*CORPUS[:20], "", "café"]
RANGES = [[-1.0] * 32, [1.5] * 32]
LIKE_SENTENCE_TRANSFORMERS = ("int8", "uint8", "binary", "ubinary")


def runner_of(
    folder: str, choice: RuntimeChoice | None = None, dtype: str = "float32", **params: Any
) -> Runner:
    spec = JobSpec.build(
        {
            "task": "embedding", "model": {"name": folder, "dtype": dtype}, "params": params, "input": "in",
            "output": "out", "batch": {"size": 8},
        }
    )  # fmt: skip
    config = RunnerConfig.of(spec, pin(spec.model), choice=choice)
    return Runner(RunnerConfig.from_json(config.to_json()), share=1e-9)


def proposed(runner: Runner, texts: list[str]) -> RuntimeChoice:
    """The choice of the first worker, as job.json holds it."""
    columns = {"text": pa.array(texts)}
    places = pa.table({"file": ["a"] * len(texts), "row": pa.array(range(len(texts)), pa.int64())})
    choice = runner.propose(runner.preprocess(columns, places).features, len(texts), columns)
    return RuntimeChoice(**json.loads(json.dumps(asdict(choice))))


def stored(runner: Runner, texts: list[str]) -> np.ndarray:
    return np.stack(runner.run({"text": pa.array(texts)}).columns["embedding"].to_numpy(False))


@pytest.mark.parametrize("precision", LIKE_SENTENCE_TRANSFORMERS)
@pytest.mark.parametrize("dimension", [8, 24, 13])
def test_stored_vectors_are_those_of_sentence_transformers(precision: str, dimension: int) -> None:
    random = np.random.default_rng(0)
    made = random.normal(size=(200, dimension)).astype(np.float32)
    made[:, 3] = 0.25  # a dimension without a range
    made[5] = 0
    ranges = fit_ranges(made[:150])
    assert ranges == [made[:150].min(0).tolist(), made[:150].max(0).tolist()]
    found = store(made, precision, ranges)
    expected = quantize_embeddings(made, precision, np.array(ranges, np.float32))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_few_vectors_give_all_dimensions_one_range() -> None:
    few = np.array([[0.5, -2.0, 0.0]], np.float32)
    assert fit_ranges(few) == [[-2.0] * 3, [2.0] * 3]
    assert store(few, "uint8", fit_ranges(few)).tolist() == [[159, 0, 127]]


def test_numbers_that_float16_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="65504"):
        store(np.array([[1.0, 1e5]], np.float32), "float16")


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("pool", [None, "mean", "none"])
def test_every_precision_stores_the_vectors_of_float32(
    encoder: str, precision: str, pool: str | None
) -> None:
    options: dict[str, Any] = {"windows": {"size": 12, "pool": pool}} if pool else {}
    given = {**options, **({"ranges": RANGES} if precision.endswith("int8") else {})}
    task = make(Embedding, encoder, precision=precision, **given)
    assert task.check() == []
    exact, table = (run(one, {"text": TEXTS}) for one in (make(Embedding, encoder, **options), task))
    one, other = (each["embedding"].combine_chunks() for each in (exact, table))
    if pool == "none":
        assert table["spans"].equals(exact["spans"])
        assert other.offsets.equals(one.offsets)
        one, other = one.flatten(), other.flatten()
    floats = one.flatten().to_numpy().reshape(-1, 32)
    assert other.type.value_type == STORED[precision]
    found = other.flatten().to_numpy().reshape(len(floats), -1)
    if precision in LIKE_SENTENCE_TRANSFORMERS:
        np.testing.assert_array_equal(found, quantize_embeddings(floats, precision, np.array(RANGES)))
    else:
        np.testing.assert_array_equal(found, floats.astype(precision))
    norms = [measured(each, {"text": TEXTS}) for each in (task, make(Embedding, encoder, **options))]
    np.testing.assert_array_equal(*norms)  # the report counts the vectors, not what is stored
    assert answers_with(task.output_fields()[0].type) == (precision == "float32" and pool != "none")


def test_ranges_of_the_first_worker_hold_for_all_others(encoder: str) -> None:
    texts = [f"{text} {k}" for k in range(6) for text in CORPUS[:20]]
    exact = stored(runner_of(encoder), texts)
    choice = proposed(runner_of(encoder, precision="int8"), texts)
    assert choice.fitted is not None
    ranges = np.array(choice.fitted["ranges"])
    np.testing.assert_allclose(ranges, [exact.min(0), exact.max(0)], rtol=1e-4, atol=1e-5)

    later = runner_of(encoder, precision="int8")
    later.apply(choice)
    resumed = runner_of(encoder, choice, precision="int8")
    expected = stored(runner_of(encoder, precision="int8", ranges=ranges.tolist()), texts[:7])
    for runner in (later, resumed):
        np.testing.assert_array_equal(stored(runner, texts[:7]), expected)
    common = proposed(runner_of(encoder, precision="int8", ranges="common"), texts).fitted
    assert common is not None
    size = np.abs(exact).max()
    np.testing.assert_allclose(common["ranges"], [[-size] * 32, [size] * 32], rtol=1e-4)
    assert proposed(runner_of(encoder, precision="int8", ranges=RANGES), texts).fitted is None
    assert proposed(runner_of(encoder, precision="binary"), texts).fitted is None


def test_a_preview_takes_ranges_of_its_own_rows(encoder: str) -> None:
    size = np.abs(stored(runner_of(encoder), TEXTS)).max()
    ranges = [[-float(size)] * 32, [float(size)] * 32]
    expected = stored(runner_of(encoder, precision="uint8", ranges=ranges), TEXTS)
    np.testing.assert_array_equal(stored(runner_of(encoder, precision="uint8"), TEXTS), expected)
    assert "params.ranges" in " ".join(make(Embedding, encoder, precision="int8").notes())


@pytest.mark.parametrize("windows", [None, {"size": 12, "pool": "none"}])
@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_model_in_lowered_precision_is_compared_before_vectors_are_rounded(
    encoder: str, precision: str, windows: dict[str, Any] | None
) -> None:
    params = {"windows": windows} if windows else {}
    rounded = proposed(runner_of(encoder, dtype="bfloat16", precision=precision, **params), TEXTS).guard
    plain = proposed(runner_of(encoder, dtype="bfloat16", **params), TEXTS).guard
    assert rounded is not None
    assert plain is not None
    assert rounded["status"] == "passed"
    cosine = rounded["measures"]["cosine_mean"]
    assert 0.99 < cosine < 1
    assert cosine == pytest.approx(plain["measures"]["cosine_mean"], abs=1e-3)


@pytest.mark.parametrize(
    ("precision", "ranges", "fault"),
    [
        ("int8", [[0, 0], [1, 1]], "has 2 lists of 2, 2 numbers, and vectors have 32 dimensions"),
        ("int8", RANGES[:1], "has 1 lists of 32 numbers"),
        ("int8", RANGES[::-1], "give the list of the minima first"),
        ("binary", "common", "leave them out"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(encoder: str, precision: str, ranges: Any, fault: str) -> None:
    assert fault in make(Embedding, encoder, precision=precision, ranges=ranges).check()[0]


def test_ranges_need_a_row_with_a_vector(encoder: str) -> None:
    with pytest.raises(ValueError, match=r"no row .* set params\.ranges"):
        make(Embedding, encoder, precision="int8").fit(pa.table({}))


def test_vectors_keep_their_values_in_float16(encoder: str) -> None:
    exact = vectors(run(make(Embedding, encoder), {"text": TEXTS}))
    half = vectors(run(make(Embedding, encoder, precision="float16"), {"text": TEXTS}))
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-4)
