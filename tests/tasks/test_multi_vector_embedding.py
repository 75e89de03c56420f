"""Vectors of tokens equal those of sentence-transformers' MultiVectorEncoder, and the rules of ColBERT written out."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from hfbatch.engines.base import Capability
from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.text.multi_vector_embedding import MultiVectorEmbedding
from tests.models.late import SIZE, WIDTH, tiny_colbert, tiny_pylate
from tests.models.text import CORPUS, tiny_bert_encoder, tiny_llama
from tests.tasks.drive import features_of, make, measured, run

TEXTS = [*CORPUS[:5], "", "river " * 90, "what, the model; said. before dawn!", "?"]


@pytest.fixture(scope="module")
def pylate(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pylate(tmp_path_factory.mktemp("pylate"))


def vectors_of(task: Any) -> list[np.ndarray]:
    assert task.check() == []
    found = run(task, {"text": TEXTS}, multiple=8)
    assert found.schema == pa.schema(task.output_fields())
    return [np.array(row, np.float32).reshape(-1, task.dimension) for row in found["embeddings"].to_pylist()]


def assert_near(found: list[np.ndarray], expected: Iterable[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == tuple(other.shape)
        np.testing.assert_allclose(one, other, atol=2e-5)


def assert_like_sentence_transformers(folder: str) -> None:
    model = MultiVectorEncoder(folder, device="cpu")
    assert_near(vectors_of(make(MultiVectorEmbedding, folder)), model.encode_document(TEXTS))
    assert_near(vectors_of(make(MultiVectorEmbedding, folder, kind="query")), model.encode_query(TEXTS))


def by_hand(
    folder: str, marker: str, length: int, expand: bool, attend: bool, skipped: str, project: list[Any]
) -> Callable[[str], torch.Tensor]:
    """The rules of ColBERT, for one text after another."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    skip = tokenizer.convert_tokens_to_ids(list(skipped))

    def vectors(text: str) -> torch.Tensor:
        ids = tokenizer(text, truncation=True, max_length=length - 1)["input_ids"]
        ids.insert(1, tokenizer.convert_tokens_to_ids(marker))
        seen, ids = len(ids), ids + [tokenizer.mask_token_id] * (length - len(ids) if expand else 0)
        mask = [int(attend or at < seen) for at in range(len(ids))]
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), attention_mask=torch.tensor([mask])).last_hidden_state[0]
            for weight in project:
                hidden = hidden @ weight.T
        return normalize(hidden, dim=-1)[torch.tensor([token not in skip for token in ids])]

    return vectors


def projections(folder: str | Path) -> list[torch.Tensor]:
    """The weights of the Dense modules of `tiny_pylate`."""
    return [load_file(Path(folder) / f"{at}_Dense" / "model.safetensors")["linear.weight"] for at in (1, 2)]


@pytest.mark.parametrize("kind", ["document", "query"])
@pytest.mark.parametrize("attend", [False, True])
def test_files_of_pylate_give_its_vectors(tmp_path: Path, kind: str, attend: bool) -> None:
    folder = tiny_pylate(tmp_path, attend_to_expansion_tokens=attend)
    query = kind == "query"
    rules = ("[Q] ", 20, True, attend, "") if query else ("[D] ", 30, False, False, ".,")
    task = make(MultiVectorEmbedding, folder, kind=kind)
    assert_near(vectors_of(task), map(by_hand(folder, *rules, projections(folder)), TEXTS))
    assert features_of(task, {"text": TEXTS}).truncated == 1
    assert task.notes() == []
    if query:
        assert measured(task, {"text": TEXTS}).tolist() == [20] * len(TEXTS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_query_expansion": False},
        {"skiplist_words": None, "query_length": None},
        {"skiplist_words": ["river", "no token of this tokenizer"], "model_type": "left out"},
        {"query_prefix": "", "document_prefix": ""},
        {"prompts": {"query": "the question ", "document": ""}},
    ],
)
def test_files_of_pylate_are_read_as_sentence_transformers_reads_them(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = tiny_pylate(tmp_path, **settings)
    if settings.get("model_type"):  # which sentence-transformers needs
        found = vectors_of(make(MultiVectorEmbedding, folder))
        assert found[6].shape == (3, WIDTH)  # of its 30 tokens, 27 are `river`
        return
    assert_like_sentence_transformers(folder)


@pytest.mark.parametrize("kind", ["document", "query"])
def test_an_original_checkpoint_gives_the_vectors_of_colbert(tmp_path: Path, kind: str) -> None:
    folder = tiny_colbert(tmp_path)
    project = [load_file(tmp_path / "model.safetensors")["linear.weight"]]
    query = kind == "query"
    rules = (
        ("[unused0]", 20, True, False, "") if query else ("[unused1]", 30, False, False, string.punctuation)
    )
    task = make(MultiVectorEmbedding, folder, kind=kind)
    assert_near(vectors_of(task), map(by_hand(folder, *rules, project), TEXTS))


def test_settings_of_an_original_checkpoint_are_those_that_sentence_transformers_reads(
    tmp_path: Path,
) -> None:
    folder = tiny_colbert(tmp_path, mask_punctuation=False, attend_to_mask_tokens=True, query_maxlen=24)
    assert_like_sentence_transformers(folder)
    (tmp_path / "artifact.metadata").unlink()
    assert make(MultiVectorEmbedding, folder).limit == 64  # 220 by default, which the model does not have
    assert make(MultiVectorEmbedding, folder, kind="query").limit == 32


def test_an_original_checkpoint_that_sentence_transformers_has_saved_stays_the_same(tmp_path: Path) -> None:
    folder = tiny_colbert(tmp_path / "original")
    MultiVectorEncoder(folder, device="cpu").save_pretrained(str(tmp_path / "saved"))
    for kind in ("document", "query"):
        one, other = (
            make(MultiVectorEmbedding, where, kind=kind) for where in (folder, str(tmp_path / "saved"))
        )
        assert_near(vectors_of(one), vectors_of(other))


def native(encoder: str, out: Path, mask: dict[str, Any], normalized: bool = True, **settings: Any) -> str:
    """Saves a MultiVectorEncoder of sentence-transformers."""
    prompts = settings.pop("prompts", {"query": "the question: ", "document": "the table: "})
    modules = [
        Transformer(encoder, **settings),
        Dense(SIZE, WIDTH, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
        MultiVectorMask(**mask),
        *([Normalize(module_input_name="token_embeddings")] if normalized else []),
    ]  # fmt: skip
    torch.manual_seed(0)
    MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts).save_pretrained(str(out))
    return str(out)


@pytest.mark.parametrize(
    ("mask", "settings"),
    [
        ({}, {}),
        ({"skiplist_words": [".", ","], "skiplist_tasks": ["query", "document"]},
         {"query_length": 12, "document_length": 15, "normalized": False}),
        ({"skiplist_words": [".", "not a token"]},
         {"query_expansion": {"strategy": "fixed", "length": 18, "attend": True}, "prompts": {"passage": "the table: "}}),
        ({"keep_only_token_ids": [2, 3]},
         {"query_expansion": {"strategy": "min", "length": 18, "token": "[SEP]"}, "query_length": 25}),
    ],
)  # fmt: skip
def test_files_of_sentence_transformers_are_followed(
    tmp_path: Path, mask: dict[str, Any], settings: dict[str, Any]
) -> None:
    encoder = tiny_bert_encoder(tmp_path / "encoder")
    assert_like_sentence_transformers(native(encoder, tmp_path / "native", mask, **settings))


@pytest.mark.parametrize("single", [False, True])
def test_other_models_give_hidden_states_of_length_1_and_say_so(tmp_path: Path, single: bool) -> None:
    folder = tiny_bert_encoder(tmp_path)
    if single:  # files for one vector
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
    task = make(MultiVectorEmbedding, folder, kind="query")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [tokenizer(text, return_tensors="pt", truncation=True) for text in TEXTS]
        expected = [normalize(model(**row).last_hidden_state[0], dim=-1) for row in rows]
    assert_near(vectors_of(task), expected)
    assert "scaled to length 1, without markers" in task.notes()[0]


def test_a_causal_model_without_padding_token_gives_the_vectors_of_its_single_rows(tmp_path: Path) -> None:
    task = make(MultiVectorEmbedding, tiny_llama(tmp_path))
    assert task.asks == {Capability.FORWARD}
    found = run(task, {"text": TEXTS}, size=1)["embeddings"].to_pylist()
    assert_near(vectors_of(task), map(np.array, found))


def test_a_length_of_the_spec_replaces_that_of_the_files(pylate: str) -> None:
    task = make(MultiVectorEmbedding, pylate, max_length=25, kind="query")
    assert measured(task, {"text": TEXTS}).tolist() == [25] * len(TEXTS)
    assert make(MultiVectorEmbedding, pylate, max_length=60).check() == []


def test_faults_are_found_together(tmp_path: Path) -> None:
    folder = tiny_pylate(tmp_path, markers=())
    path = tmp_path / "2_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_features": 23}))
    faults = make(MultiVectorEmbedding, folder, max_length=65, prompt="a", prompt_name="b").check()
    parts = ("takes 23 numbers, gets 24", "marker '[D] '", "batch.max_length 65", "both set", "'b'")
    for fault, part in zip(faults, parts, strict=True):
        assert part in fault
    assert "no room beside 3 special" in make(MultiVectorEmbedding, folder, max_length=3).check()[-1]


def test_modules_that_cannot_be_applied_are_named(tmp_path: Path) -> None:
    folder = native(tiny_bert_encoder(tmp_path / "encoder"), tmp_path / "native", {})
    pooled = MultiVectorEncoder(folder, device="cpu")
    pooled.append(HierarchicalTokenPooling(2.0))
    pooled.save_pretrained(str(tmp_path / "pooled"))
    (fault,) = make(MultiVectorEmbedding, str(tmp_path / "pooled")).check()
    assert "HierarchicalTokenPooling" in fault


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("artifact.metadata", "{", "artifact.metadata is not JSON"),
        (
            "config.json",
            {"architectures": ["ColPaliForRetrieval"]},
            "MultiVectorEncoder of sentence-transformers",
        ),
        ("model.safetensors", None, "lack linear.weight"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, content: Any, part: str
) -> None:
    folder = tiny_colbert(tmp_path)
    if content is None:
        (tmp_path / name).write_bytes((Path(tiny_bert_encoder(tmp_path / "other")) / name).read_bytes())
    elif isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        (tmp_path / name).write_text(json.dumps({**json.loads((tmp_path / name).read_text()), **content}))
    assert part in make(MultiVectorEmbedding, folder).check()[0]


def test_embedding_refuses_the_files_and_says_what_to_use(pylate: str) -> None:
    assert "task multi-vector-embedding" in make(Embedding, pylate).check()[0]
