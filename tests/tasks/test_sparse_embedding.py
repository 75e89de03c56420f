"""Sparse embeddings equal those of sentence-transformers' SparseEncoder, and the formula written out for each row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hfbatch.tasks.agreement import SparseVectors
from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.text import sparse_embedding
from hfbatch.tasks.text.sparse_embedding import SparseEmbedding
from tests.models.text import CORPUS, tiny_bert_for
from tests.tasks.drive import features_of, forward, load, make, measured, run

TEXTS = [*CORPUS[:6], "", "river " * 90, "Before dawn, the model said."]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with a masked language head, without files of sentence-transformers."""
    return tiny_bert_for(tmp_path_factory.mktemp("masked"), "MaskedLM")


def splade(folder: str, out: Path, pooling: dict[str, str] | None = None, **options: Any) -> str:
    """Saves a SparseEncoder on the model in folder."""
    modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling(**(pooling or {}))]
    SparseEncoder(modules=modules, device="cpu", **options).save_pretrained(str(out))
    return str(out)


def dense(table: pa.Table, size: int) -> np.ndarray:
    """The vectors with their zeros; indices ascend and values are above zero."""
    vectors = np.zeros((len(table), size), np.float32)
    for row, (indices, values) in enumerate(zip(*table.to_pydict().values(), strict=True)):
        assert indices == sorted(set(indices))
        assert all(value > 0 for value in values)
        vectors[row, indices] = values
    return vectors


def assert_like_sentence_transformers(
    folder: str, encode: dict[str, Any] | None = None, **params: Any
) -> None:
    task = make(SparseEmbedding, folder, **params)
    assert task.check() == []
    encoder = SparseEncoder(folder, device="cpu")
    expected = encoder.encode(TEXTS, convert_to_sparse_tensor=False, **(encode or {})).numpy()
    found = dense(run(task, {"text": TEXTS}, multiple=8), expected.shape[1])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_rows_are_those_of_transformers_alone(masked: str, pooling: str, activation: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(masked)
    model = AutoModelForMaskedLM.from_pretrained(masked).eval()
    task = make(SparseEmbedding, masked, pooling=pooling, activation=activation)
    found = run(task, {"text": TEXTS}, multiple=8)
    assert found.schema == pa.schema(task.output_fields())
    for row, text in zip(dense(found, len(tokenizer)), TEXTS, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0]
        weights = torch.log1p(torch.relu(logits))
        weights = torch.log1p(weights) if activation == "log1p_relu" else weights
        expected = weights.amax(0) if pooling == "max" else weights.sum(0)
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", [{}, {"pooling_strategy": "sum", "activation_function": "log1p_relu"}])
def test_files_of_sentence_transformers_are_followed(
    masked: str, tmp_path: Path, pooling: dict[str, str]
) -> None:
    folder = splade(masked, tmp_path, pooling)
    assert_like_sentence_transformers(folder)
    assert make(SparseEmbedding, folder).notes() == []


def test_files_of_older_versions_are_read(masked: str, tmp_path: Path) -> None:
    folder = splade(masked, tmp_path)
    types = ["MLMTransformer", "SpladePooling"]
    modules = [
        {"idx": at, "name": str(at), "path": "" if at == 0 else "1_SpladePooling", "type": f"sentence_transformers.sparse_encoder.models.{kind}"}
        for at, kind in enumerate(types)
    ]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    task = make(SparseEmbedding, folder)
    assert (task.check(), task.limit) == ([], 16)
    assert features_of(task, {"text": TEXTS}).truncated == sum(
        len(ids) > 16 for ids in task.tokenizer(TEXTS)["input_ids"]
    )
    assert_like_sentence_transformers(folder)


def test_prompts_are_put_in_front(masked: str, tmp_path: Path) -> None:
    folder = splade(masked, tmp_path, prompts={"query": "the question: ", "document": ""})
    assert_like_sentence_transformers(folder, {"prompt_name": "query"}, prompt_name="query")
    assert_like_sentence_transformers(folder, {"prompt": "a table: "}, prompt="a table: ")
    assert "(query)" in make(SparseEmbedding, folder).notes()[0]


@pytest.mark.parametrize("most", [1, 7, 100_000])
def test_the_largest_values_are_kept(masked: str, tmp_path: Path, most: int) -> None:
    assert_like_sentence_transformers(
        splade(masked, tmp_path), {"max_active_dims": most}, max_active_dims=most
    )
    task = make(SparseEmbedding, masked, max_active_dims=most)
    whole = measured(make(SparseEmbedding, masked), {"text": TEXTS})
    assert measured(task, {"text": TEXTS}).tolist() == np.minimum(whole, most).tolist()


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_logits_are_pooled_in_parts(masked: str, monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    task = make(SparseEmbedding, masked, pooling=pooling)
    whole = run(task, {"text": TEXTS})
    monkeypatch.setattr(sparse_embedding, "CELLS", 1)
    parts = run(task, {"text": TEXTS})
    assert parts["indices"].equals(whole["indices"])
    np.testing.assert_allclose(dense(parts, 400), dense(whole, 400), rtol=1e-5)


def test_rows_without_weights_are_empty_and_nan_stays(masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(SparseEmbedding, masked, max_active_dims=3)
    model = load(task)
    for value, length, finite in ((-9.0, 0, True), (float("nan"), 3, False)):
        with torch.no_grad():
            model.cls.predictions.decoder.weight.zero_()
            model.cls.predictions.bias.fill_(value)
            model.cls.predictions.decoder.bias.fill_(value)
        monkeypatch.setattr("tests.tasks.drive._loaded", lambda *_: model)
        found = forward(task, features_of(task, {"text": TEXTS[:2]}).table)
        assert [len(row) for row in found["values"].to_pylist()] == [length] * 2
        assert np.isfinite(found["values"].combine_chunks().flatten().to_numpy()).all() == finite


def test_other_kinds_of_sparse_encoders_are_refused_with_what_to_use(masked: str, tmp_path: Path) -> None:
    folder = splade(masked, tmp_path, {"pooling_strategy": "sum"})
    written = json.loads((tmp_path / "modules.json").read_text())
    for name, instead in (
        ("sparse_encoder.modules.sparse_auto_encoder.SparseAutoEncoder", "task embedding"),
        ("sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding", "SPLADE model"),
        ("base.modules.router.Router", "document encoder"),
        ("sentence_transformer.modules.lstm.LSTM", "MLMTransformer and SpladePooling"),
    ):
        changed = [written[0], {**written[1], "type": f"sentence_transformers.{name}"}]
        (tmp_path / "modules.json").write_text(json.dumps(changed))
        (fault,) = make(SparseEmbedding, folder).check()
        assert name.rpartition(".")[2] in fault
        assert instead in fault


def test_faults_are_found_together(masked: str, tmp_path: Path) -> None:
    folder = splade(masked, tmp_path)
    (tmp_path / "1_SpladePooling" / "config.json").write_text(
        '{"pooling_strategy": "mean", "activation_function": "gelu"}'
    )
    faults = make(SparseEmbedding, folder, max_length=99, prompt="a", prompt_name="b").check()
    for fault, part in zip(
        faults, ("'mean'", "'gelu'", "batch.max_length 99", "both set", "'b'"), strict=True
    ):
        assert part in fault


def test_files_of_another_task_are_refused_by_both(masked: str, tmp_path: Path) -> None:
    (fault,) = make(Embedding, splade(masked, tmp_path)).check()
    assert "use that task" in fault
    assert "sparse-embedding" in fault
    config = {"model_type": "SentenceTransformer"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    written = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(written))
    (fault,) = make(SparseEmbedding, str(tmp_path)).check()
    assert "task embedding; use that task" in fault


def test_agreement_counts_the_zeros(masked: str) -> None:
    found = run(make(SparseEmbedding, masked), {"text": TEXTS})
    columns = {name: found[name].combine_chunks() for name in found.column_names}
    measure = SparseVectors("indices", "values")
    same = measure.compare(columns, columns)
    assert same.rows.tolist() == pytest.approx([1.0] * len(TEXTS))
    assert same.measures["spread_change"] == 0
    halves = {"indices": pa.array([[1, 5], []], pa.list_(pa.int32())), "values": pa.array([[3.0, 4.0], []])}
    others = {
        "indices": pa.array([[5, 9], [2]], pa.list_(pa.int32())),
        "values": pa.array([[4.0, 3.0], [1.0]]),
    }
    assert measure.compare(halves, others).rows.tolist() == pytest.approx([16 / 25, 0.0])
