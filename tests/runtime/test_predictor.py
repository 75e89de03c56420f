"""The inner loop survives a full memory, chooses its batch size, and agrees with itself in any batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from hfbatch.engines import precision
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.precision import fastest_dtype, native_dtype
from hfbatch.engines.torch import TorchEngine
from hfbatch.errors import WorkerError
from hfbatch.hub.models import pin
from hfbatch.runtime import autotune
from hfbatch.runtime.autotune import WARM_UP_ROWS, choose_batch_size
from hfbatch.runtime.predictor import Predictor
from hfbatch.spec.job import ModelSpec
from hfbatch.tasks.base import TaskConfig
from hfbatch.tasks.multimodal.embedding import Embedding
from tests.jobs.tools import sentences
from tests.models.text import tiny_llama

MANY = 1_000_000
"""Rows of a job that is worth trials."""


class SmallMemory(Embedding):
    """Runs out of memory above four rows, as a GPU does. `sizes`: rows of the batches that fit."""

    sizes: ClassVar[list[int]] = []

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(batch["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(batch["input_ids"]))
        return super().forward(model, batch)


@pytest.fixture(scope="module")
def engine(encoder: str) -> TorchEngine:
    return TorchEngine(EngineConfig(encoder, "AutoModel", "float32"))


def features_of(task: Embedding, count: int) -> pa.Table:
    texts = sentences(count)
    places = pa.table({"file": [""] * count, "row": pa.array(range(count), pa.int64())})
    return task.preprocess({"text": pa.array(texts)}, places).table


def make(cls: type[Embedding], folder: str) -> Embedding:
    return cls(TaskConfig(pin(ModelSpec(name=folder)), cls.Params()))


def vectors(table: pa.Table) -> np.ndarray:
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(encoder: str, engine: TorchEngine) -> None:
    task = make(SmallMemory, encoder)
    features = features_of(task, 50)
    found = Predictor(task, engine, 16).predict(features)
    expected = Predictor(make(Embedding, encoder), engine, 16).predict(features)
    assert max(task.sizes) == 4
    assert found.failures == []
    assert found.kept.tolist() == list(range(50))
    assert np.abs(vectors(found.outputs) - vectors(expected.outputs)).max() < 1e-5


class Poisoned(Embedding):
    """Raises on a batch with a row of exactly 20 tokens."""

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        lengths = batch["attention_mask"].sum(1) if "attention_mask" in batch else batch["input_ids"].shape[1]
        if bool(torch.as_tensor(lengths == 20).any()):
            raise ValueError("twenty tokens")
        return super().forward(model, batch)


@pytest.mark.parametrize("threads", [1, 4])
def test_rows_that_raise_are_distinguished_while_batches_run_beside_each_other(
    encoder: str, threads: int
) -> None:
    task = make(Poisoned, encoder)
    features = features_of(task, 200)
    bad = np.flatnonzero(task.lengths(features) == 20).tolist()
    found = Predictor(task, TorchEngine(EngineConfig(encoder, "AutoModel", "float32", threads)), 8).predict(
        features
    )
    assert bad
    assert sorted(row for row, _ in found.failures) == bad
    assert found.kept.tolist() == [row for row in range(200) if row not in bad]


def test_batches_beside_each_other_give_the_bits_of_one_after_the_other(encoder: str) -> None:
    task = make(Embedding, encoder)
    features = features_of(task, 200)
    engines = [TorchEngine(EngineConfig(encoder, "AutoModel", "float32", threads)) for threads in (1, 4)]
    one, four = (Predictor(task, engine, 8).predict(features).outputs for engine in engines)
    assert one.equals(four)


def test_threads_share_a_batch_where_batches_must_not_run_beside_each_other(tmp_path: Path) -> None:
    stateful = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = tiny_llama(tmp_path, rope_parameters=stateful)
    assert TorchEngine(EngineConfig(folder, "AutoModel", "float32", 4)).depth == 1
    assert TorchEngine(EngineConfig(tiny_llama(tmp_path), "AutoModel", "float32", 4)).depth > 4
    assert (
        TorchEngine(EngineConfig(tiny_llama(tmp_path), "AutoModel", "float32", 4, concurrent=False)).depth
        == 1
    )


def test_a_budget_of_tokens_bounds_every_batch(encoder: str, engine: TorchEngine) -> None:
    task, sizes = make(Embedding, encoder), []
    Predictor(task, engine, 64, tokens=128, on_batch=lambda stats: sizes.append(stats)).predict(
        features_of(task, 60)
    )
    assert sum(stats.rows for stats in sizes) == 60
    assert all(stats.padded_tokens <= 128 or stats.rows == 1 for stats in sizes)


def test_the_chosen_batch_size_is_one_that_fits(encoder: str, engine: TorchEngine) -> None:
    task = make(Embedding, encoder)
    assert choose_batch_size(task, engine, features_of(task, 300), MANY) in engine.batch_sizes
    cramped = make(SmallMemory, encoder)
    for rows in (3, 300):  # the predictor halves what does not fit
        assert choose_batch_size(cramped, engine, features_of(cramped, rows), MANY) == engine.batch_sizes[0]


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ([1.0, 0.9, 1.6], 16),
        ([1.0, 1.2, 1.04], 8),
        ([1.0, 1.02, 1.04], 4),
        ([1.0, 2.0, None], 8),
        ([None, 2.0, 2.0], 4),
    ],
)
def test_the_fastest_batch_size_is_chosen_wherever_it_is(
    encoder: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, rates: list[float | None], chosen: int
) -> None:
    """And the smallest of those that are about as fast; None: memory is full."""
    monkeypatch.setattr(engine, "batch_sizes", (4, 8, 16))

    def rate(task: Any, engine: Any, features: Any, order: Any, size: int, batches: int) -> float:
        found = dict(zip((4, 8, 16), rates, strict=True))[size]
        if found is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(autotune, "_rate", rate)
    task = make(Embedding, encoder)
    assert choose_batch_size(task, engine, features_of(task, 100), MANY) == chosen


def test_a_row_that_raises_does_not_end_the_choice_of_a_batch_size(encoder: str, engine: TorchEngine) -> None:
    class Bad(Embedding):
        """Raises on every batch."""

        def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            raise ValueError("bad")

    task = make(Bad, encoder)
    assert choose_batch_size(task, engine, features_of(task, 50), MANY) == engine.batch_sizes[0]


@pytest.mark.parametrize(
    ("seconds", "rows", "tried"), [(0.1, MANY, False), (0.01, 300, False), (0.01, MANY, True)]
)
def test_neither_slow_rows_nor_a_short_job_are_spent_on_choosing_a_batch_size(
    encoder: str, engine: TorchEngine, seconds: float, rows: int, tried: bool
) -> None:
    calls: list[int] = []

    class Slow(Embedding):
        """Takes the same time for each row."""

        def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            calls.append(len(batch["input_ids"]))
            time.sleep(seconds * len(batch["input_ids"]))
            return super().forward(model, batch)

    task = make(Slow, encoder)
    chosen = choose_batch_size(task, engine, features_of(task, 300), rows)
    assert calls[:2] == [WARM_UP_ROWS, engine.batch_sizes[0]]
    if tried:
        assert set(calls[2:]) == set(engine.batch_sizes)
    else:
        assert (calls[2:], chosen) == ([], engine.batch_sizes[0])


def test_weights_that_lack_layers_are_refused(encoder: str) -> None:
    with pytest.raises(WorkerError, match="the weights lack"):
        TorchEngine(EngineConfig(encoder, "AutoModelForSequenceClassification", "float32"))


def test_the_native_precision_is_one_that_the_spec_knows() -> None:
    device, dtype = native_dtype()
    assert device in ("cpu", "cuda")
    assert dtype in ("bfloat16", "float32")
    assert fastest_dtype() in (dtype, "float32")


@pytest.mark.parametrize(
    ("able", "seconds", "chosen"),
    [
        ({"avx512_bf16": True}, 1.6, "float32"),
        ({"avx512_bf16": True}, 0.9, "float32"),
        ({"avx512_bf16": True}, 0.5, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": True}, None, "bfloat16"),
        ({}, None, "float32"),
    ],
)
def test_a_cpu_computes_in_the_dtype_that_it_is_faster_in(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], seconds: float | None, chosen: str
) -> None:
    """Relative to float32; None if nothing is timed."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    times = {torch.float32: 1.0, torch.bfloat16: seconds} if seconds else {}
    monkeypatch.setattr(precision, "_seconds", times.__getitem__)
    assert precision.fastest_dtype(gpus=False) == chosen
