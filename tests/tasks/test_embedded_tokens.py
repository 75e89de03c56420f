"""A tokenizer with more tokens than the model: padding costs no row, and a row with such a token is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import AutoConfig, AutoTokenizer

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import check_task
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.prepare import POSITION, preprocess
from hfbatch.spec.job import JobSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.tokens import padding_id
from tests.models.text import (
    CORPUS,
    tiny_bert,
    tiny_bert_encoder,
    tiny_bert_for,
    tiny_llama,
    tiny_llama_classifier,
    tiny_t5,
)
from tests.tasks.drive import make

TEXTS = [*CORPUS[:5], "short", "a <extra> word"]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def enlarge(folder: str, pad: bool = True) -> str:
    """Gives the tokenizer a token for padding, and one more, that the model knows nothing of."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if pad:
        tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "build", "params"),
    [
        ("embedding", tiny_bert_encoder, {}),
        ("text-classification", tiny_llama_classifier, {}),
        ("token-classification", lambda folder: tiny_bert_for(folder, "TokenClassification"), {}),
        ("text-generation", tiny_llama, GREEDY),
        ("text2text-generation", tiny_t5, {"max_new_tokens": 3}),
    ],
)
def test_padding_costs_no_row_and_a_token_beyond_the_embeddings_its_own(
    tmp_path: Path, name: str, build: Any, params: dict[str, Any]
) -> None:
    task = make(task_class(name), enlarge(build(tmp_path)), **params)
    places = pa.table({"file": ["rows.parquet"] * len(TEXTS), "row": range(len(TEXTS))})
    prepared = preprocess(task, {"text": pa.array(TEXTS)}, places)
    (reject,) = prepared.rejects
    assert (reject.position, reject.stage, reject.error) == (6, "preprocess", "NoEmbedding")
    assert "token '<extra>' has id" in reject.message
    engine = TorchEngine(EngineConfig(task.model.folder, task.auto_class, "float32", unused=task.unused))
    found = Predictor(task, engine, 4).predict(prepared.features.drop_columns([POSITION]))
    assert (found.failures, found.kept.tolist()) == ([], list(range(6)))
    assert found.batches == 2, "a batch had to be halved"


@pytest.mark.parametrize("pad", [True, False])
def test_the_plan_names_tokens_without_an_embedding_but_for_padding(tmp_path: Path, pad: bool) -> None:
    folder = enlarge(tiny_bert(tmp_path), pad)
    spec = JobSpec.build({"task": "text-classification", "model": folder, "input": "-", "output": "-"})
    faults, notes = [], []
    check_task(spec, pin(spec.model), "", faults, notes)
    assert faults == []
    (note,) = notes
    assert "'<extra>' (" in note
    assert "<new pad>" not in note
    added = {"tokenizer": {"add_tokens": ["<more>"]}}
    notes = []
    check_task(JobSpec.build({**spec.model_dump(), **added}), pin(spec.model), "", faults, notes)
    assert (faults, [note for note in notes if "beyond" in note]) == ([], [])


def test_the_padding_id_has_an_embedding(tmp_path: Path) -> None:
    folder = enlarge(tiny_llama(tmp_path))
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert tokenizer.pad_token_id >= config.vocab_size
    assert padding_id(tokenizer, config) == tokenizer.eos_token_id
    assert padding_id(tokenizer, config, len(tokenizer)) == tokenizer.pad_token_id
    config.pad_token_id = -1
    assert padding_id(tokenizer, config) == tokenizer.eos_token_id
