"""Windows over long texts: which tokens they have, and how their vectors become one of the text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from hfbatch import JobSpec
from hfbatch.hub.models import pin
from hfbatch.runtime.config import RunnerConfig
from hfbatch.runtime.runner import Runner
from hfbatch.tasks.multimodal.embedding import Embedding
from tests.models.text import CORPUS, save, tiny_bert_encoder, tiny_llama
from tests.tasks.drive import features_of, make, measured, run
from tests.tasks.test_embedding import PROMPTS, compose, normalize, pooling, vectors

LONG = [" ".join(CORPUS[:5]), "short", "", "CafÉ [SEP] " * 12, " ".join(CORPUS[5:17])]
SHAPES = [(16, 14), (16, 7), (16, 1), (9, 3), (64, 62)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT, by the files of sentence-transformers with normalized vectors."""
    bert = tiny_bert_encoder(tmp_path_factory.mktemp("encoder"))
    folder = tmp_path_factory.mktemp("sentences")
    return compose(bert, folder, pooling("mean", include_prompt=False), normalize, prompts=PROMPTS)


def overflowing(
    tokenizer: PreTrainedTokenizerBase, size: int, stride: int
) -> tuple[list[list[list[int]]], list[list[tuple[int, int]]]]:
    """The windows of each text as transformers makes them, and the characters of each."""
    ids: list[list[list[int]]] = [[] for _ in LONG]
    spans: list[list[tuple[int, int]]] = [[] for _ in LONG]
    room = size - tokenizer.num_special_tokens_to_add()
    made = tokenizer(
        LONG, truncation=True, max_length=size, stride=room - stride, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    for window, row in enumerate(made["overflow_to_sample_mapping"]):
        parts = made.sequence_ids(window)
        inside = [
            place for place, part in zip(made["offset_mapping"][window], parts, strict=True) if part == 0
        ]
        ids[row].append(made["input_ids"][window])
        spans[row].append((inside[0][0], inside[-1][1]) if inside else (0, 0))
    return ids, spans


@pytest.mark.parametrize(("size", "stride"), SHAPES)
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_windows_are_those_of_transformers(encoder: str, size: int, stride: int, pool: str) -> None:
    task = make(Embedding, encoder, windows={"size": size, "stride": stride, "pool": pool})
    assert task.check() == []
    ids, spans = overflowing(AutoTokenizer.from_pretrained(encoder), size, stride)
    made = features_of(task, {"text": LONG})
    assert made.truncated == 0
    assert made.table["input_ids"].to_pylist() == ids
    assert task.lengths(made.table).tolist() == [sum(map(len, row)) for row in ids]
    if pool == "none":
        starts, ends = (made.table[name].to_pylist() for name in ("window_start", "window_end"))
        assert [list(zip(*row, strict=True)) for row in zip(starts, ends, strict=True)] == spans


def test_windows_do_not_overlap_and_are_as_long_as_rows_unless_set(encoder: str) -> None:
    found = features_of(make(Embedding, encoder, windows={}), {"text": LONG})
    assert (
        found.table["input_ids"].to_pylist() == overflowing(AutoTokenizer.from_pretrained(encoder), 64, 62)[0]
    )


@pytest.mark.parametrize("pool", ["mean", "max", "none"])
def test_pooled_vectors_are_those_computed_by_hand(encoder: str, pool: str) -> None:
    task = make(Embedding, encoder, windows={"size": 16, "stride": 7, "pool": pool})
    table = run(task, {"text": LONG}, size=4)
    model = AutoModel.from_pretrained(encoder).eval()
    rows, spans = overflowing(AutoTokenizer.from_pretrained(encoder), 16, 7)
    expected: list[Any] = []
    for row in rows:
        with torch.inference_mode():
            found = [model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in row]
        unit = torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()
        weights = [len(ids) - 2 for ids in row]
        if pool == "none":
            expected.append(unit)
        elif len(row) == 1:
            expected.append(unit[0])
        else:
            pooled = unit.max(0) if pool == "max" else np.average(unit, axis=0, weights=weights)
            expected.append(pooled / np.linalg.norm(pooled))
    for got, want in zip(table["embedding"].to_pylist(), expected, strict=True):
        np.testing.assert_allclose(np.array(got), want, atol=1e-5)
    if pool == "none":
        assert table["spans"].to_pylist() == [[{"start": a, "end": b} for a, b in row] for row in spans]
        assert table.schema.field("embedding").type == pa.list_(pa.list_(pa.float32(), 32))


def test_vectors_that_are_not_normalized_are_pooled_as_they_are(encoder: str) -> None:
    windows = {"size": 16, "pool": "mean"}
    mean = vectors(run(make(Embedding, encoder, normalize=False, windows=windows), {"text": LONG}))
    each = run(make(Embedding, encoder, normalize=False, windows={**windows, "pool": "none"}), {"text": LONG})
    first = np.array(each["embedding"][0].as_py())
    weights = [len(ids) - 2 for ids in overflowing(AutoTokenizer.from_pretrained(encoder), 16, 14)[0][0]]
    np.testing.assert_allclose(mean[0], np.average(first, axis=0, weights=weights), atol=1e-5)
    assert measured(make(Embedding, encoder, normalize=False, windows=windows), {"text": LONG}) == (
        pytest.approx(np.linalg.norm(mean, axis=1), rel=1e-5)
    )


@pytest.mark.parametrize("prompt", [{}, {"prompt_name": "query"}])
@pytest.mark.parametrize("pool", ["mean", "max", "none"])
def test_a_text_that_fits_has_the_very_same_vector(encoder: str, pool: str, prompt: dict[str, str]) -> None:
    texts = {"text": [CORPUS[0], "", "short"]}
    plain = run(make(Embedding, encoder, **prompt), texts)
    found = run(make(Embedding, encoder, windows={"size": 60, "stride": 5, "pool": pool}, **prompt), texts)
    if pool == "none":
        assert [row[0] for row in found["embedding"].to_pylist()] == plain["embedding"].to_pylist()
        assert found["spans"][0].as_py() == [{"start": 0, "end": len(CORPUS[0])}]
    else:
        assert found.equals(plain)


def test_each_window_has_the_prompt_and_its_part_of_the_text(encoder: str) -> None:
    task = make(Embedding, encoder, prompt_name="query", windows={"size": 24, "stride": 6, "pool": "none"})
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    prompt = tokenizer(PROMPTS["query"], add_special_tokens=False)["input_ids"]
    text = tokenizer(LONG[0], add_special_tokens=False)["input_ids"]
    room = 24 - 2 - len(prompt)
    starts = range(0, len(text) - room + 6, 6)
    windows = [
        [tokenizer.cls_token_id, *prompt, *text[start : start + room], tokenizer.sep_token_id]
        for start in starts
    ]
    assert features_of(task, {"text": LONG}).table["input_ids"][0].as_py() == windows
    table = run(task, {"text": LONG})
    spans = [(span["start"], span["end"]) for span in table["spans"][0].as_py()]
    pieces = [tokenizer(LONG[0][a:b], add_special_tokens=False)["input_ids"] for a, b in spans]
    assert pieces[0] == text[:room]  # later windows may begin within a word
    assert spans[-1][1] == len(LONG[0])
    # A window is embedded as the text would be that it holds.
    alone = run(make(Embedding, encoder, prompt_name="query"), {"text": [LONG[0][: spans[0][1]]]})
    np.testing.assert_allclose(table["embedding"][0].as_py()[0], vectors(alone)[0], atol=1e-6)


def test_windows_of_several_rows_share_batches(encoder: str) -> None:
    spec = JobSpec.build(
        {
            "task": "embedding", "model": {"name": encoder, "dtype": "float32"}, "input": "in", "output": "out",
            "params": {"windows": {"size": 16, "stride": 7}}, "batch": {"size": 8},
        }
    )  # fmt: skip
    runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=1e-9)
    runner.apply(runner.default_choice())
    columns = {"text": pa.array([*LONG, None])}
    done = runner.run(columns)
    count = sum(map(len, overflowing(AutoTokenizer.from_pretrained(encoder), 16, 7)[0]))
    made = runner.predict(runner.preprocess(columns, pa.table({"file": ["a"] * 6, "row": range(6)})).features)
    assert made.stats.batches == -(-count // 8)
    assert not done.cut.any()
    assert [reject.position for reject in done.rejects] == [5]
    expected = vectors(run(make(Embedding, encoder, windows={"size": 16, "stride": 7}), {"text": LONG}))
    np.testing.assert_allclose(np.stack(done.columns["embedding"].to_numpy(False)), expected, atol=1e-5)


def test_a_tokenizer_in_python_has_windows_without_spans(tmp_path: Path) -> None:
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save(tmp_path, T5EncoderModel(config), ByT5Tokenizer())
    task = make(Embedding, folder, windows={"size": 16, "stride": 10})
    assert task.check() == []
    (end,) = task.tokenizer("")["input_ids"]
    text = task.tokenizer("four and twenty words")["input_ids"][:-1]
    windows = [[*text[:15], end], [*text[10:], end]]
    assert features_of(task, {"text": ["four and twenty words"]}).table["input_ids"].to_pylist() == [windows]
    assert "no maximum length; set params.windows.size" in make(Embedding, folder, windows={}).check()[0]
    listed = make(Embedding, folder, windows={"size": 16, "pool": "none"})
    assert "set params.windows.pool to mean" in listed.check()[0]


def test_the_padding_and_the_end_token_of_a_causal_model_stay_where_they_are(tmp_path: Path) -> None:
    task = make(Embedding, tiny_llama(tmp_path), pooling="lasttoken", windows={"size": 32, "stride": 16})
    alone = vectors(run(task, {"text": LONG}, size=1))
    np.testing.assert_allclose(vectors(run(task, {"text": LONG}, 7, 8)), alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        (
            {"windows": {"size": 65}},
            "params.windows.size 65 is more than the 64 tokens of a row; set at most 64",
        ),
        ({"windows": {"size": 2}}, "leaves no room for text beside 2 special tokens"),
        ({"windows": {"size": 16, "stride": 15}}, "stride 15 skips text: .* holds 14 .* set at most 14"),
        ({"windows": {"size": 16}, "truncate_dim": 8}, "set params.normalize to true"),
    ],
)
def test_windows_that_lose_text_are_refused(encoder: str, params: dict[str, Any], fault: str) -> None:
    assert re.search(fault, " ".join(make(Embedding, encoder, **params).check()))


def test_windows_over_images_are_refused(encoder: str) -> None:
    assert "params.windows is for texts" in make(Embedding, encoder, windows={}).column_faults({"image"})[0]
