"""Section `tokenizer` of a spec: the answers are those of transformers with the same changes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from hfbatch import SpecError
from hfbatch.hub.models import Model
from hfbatch.predict.plan import Plan, make_plan
from hfbatch.runtime.config import RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import TokenizerSpec
from hfbatch.tasks import task_class
from hfbatch.tasks.base import TaskConfig
from tests.jobs.tools import make_spec, sentences, write_shards
from tests.models.text import CORPUS, tiny_bert, tiny_bert_for, tiny_llama, tiny_t5
from tests.models.vision import tiny_vision

CHANGES = {
    "add_tokens": ["mountain before", "nightly"],
    "add_special_tokens": ["<row>"],
    "special_tokens": {"bos_token": "<begin>"},
}
READER = "image_text_to_text.ImageTextToTextPipeline"
"""A pipeline that asks for a processor."""
TEXTS = [f"{'<row> ' * (k % 2)}{text}" for k, text in enumerate(CORPUS[1::6])]


def by_hand(folder: str, auto_class: str, seed: int = 0) -> tuple[Any, Any]:
    """Tokenizer and model, changed as transformers' documentation says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(CHANGES["special_tokens"])
    tokenizer.add_tokens(CHANGES["add_special_tokens"], special_tokens=True)
    tokenizer.add_tokens(CHANGES["add_tokens"])
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer))
    return tokenizer, model


def planned(task: str, folder: str, tmp_path: Path, changes: dict[str, Any], **sections: Any) -> Plan:
    """The plan of a job over some rows."""
    source = write_shards(tmp_path / "in", sentences(4), shards=1)
    return make_plan(make_spec(task, folder, source, tmp_path / "out", tokenizer=changes, **sections))


def answers(
    task: str, folder: str, tmp_path: Path, size: int, texts: list[str] = TEXTS, **sections: Any
) -> dict[str, list[Any]]:
    """What a worker process makes of texts: values of each output column."""
    runner = Runner(
        replace(
            planned(task, folder, tmp_path, CHANGES, **sections).runner,
            choice=RuntimeChoice(size, "float32", "cpu"),
        )
    )
    made = runner.run({"text": pa.array(texts)})
    assert made.rejects == []
    return {name: column.to_pylist() for name, column in made.columns.items()}


def places_of(texts: list[str]) -> pa.Table:
    return pa.table({"file": ["a.parquet"] * len(texts), "row": range(len(texts))})


@pytest.mark.parametrize("size", [1, 8])
def test_a_classifier_with_new_tokens_scores_as_one_changed_by_hand(tmp_path: Path, size: int) -> None:
    folder = tiny_bert(tmp_path / "model")
    tokenizer, model = by_hand(folder, "AutoModelForSequenceClassification", seed=7)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    expected = [pipe(text)[0] for text in TEXTS]
    found = answers("text-classification", folder, tmp_path, size, seed=7)
    assert len(set(found["label"])) > 1
    assert found["label"] == [one["label"] for one in expected]
    np.testing.assert_allclose(found["score"], [one["score"] for one in expected], atol=1e-4)
    plain = transformers.pipeline("text-classification", folder)
    assert np.abs(np.array(found["score"]) - [plain(text)[0]["score"] for text in TEXTS]).max() > 1e-3


@pytest.mark.parametrize(
    ("task", "build", "auto_class"),
    [
        ("text-generation", tiny_llama, "AutoModelForCausalLM"),
        ("text2text-generation", tiny_t5, "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_model_with_new_tokens_writes_as_one_changed_by_hand(
    tmp_path: Path, task: str, build: Any, auto_class: str
) -> None:
    folder = build(tmp_path / "model")
    tokenizer, model = by_hand(folder, auto_class)
    prompts = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    skip = [len(prompt["input_ids"][0]) if task == "text-generation" else 0 for prompt in prompts]
    made = [
        model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
        )[0]
        for prompt in prompts
    ]
    expected = [
        tokenizer.decode(ids[k:], skip_special_tokens=True) for ids, k in zip(made, skip, strict=True)
    ]
    params: dict[str, Any] = {"max_new_tokens": 8}
    if task == "text-generation":
        params |= {"do_sample": False, "return_full_text": False}
    (found,) = answers(task, folder, tmp_path, 8, params=params).values()
    assert len(set(expected)) > 5
    assert found == expected


def test_masks_are_filled_through_the_pipeline_with_new_tokens(tmp_path: Path) -> None:
    folder = tiny_bert_for(tmp_path / "model", "MaskedLM")
    tokenizer, model = by_hand(folder, "AutoModelForMaskedLM")
    pipe = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)
    texts = [f"{text} [MASK]" for text in TEXTS]
    expected = [[one["sequence"] for one in pipe(text)] for text in texts]
    found = answers("fill-mask", folder, tmp_path, 8, texts, params={"top_k": 3})
    assert len({tuple(row) for row in expected}) > 5
    assert [[one["sequence"] for one in row[0]] for row in found["fills"]] == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_is_cut_is_the_one_asked_for(tmp_path: Path, side: str) -> None:
    folder = tiny_bert(tmp_path / "model")
    plan = planned("embedding", folder, tmp_path, {"truncation_side": side}, batch={"max_length": 5})
    made = plan.runner.build_task().preprocess({"text": pa.array(CORPUS[:1])}, places_of(CORPUS[:1]))
    (ids,) = made.table["input_ids"].to_pylist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side=side)
    assert ids == tokenizer(CORPUS[0], truncation=True, max_length=5)["input_ids"]
    assert (ids[1:4] == tokenizer(CORPUS[0])["input_ids"][1:4]) == (side == "right")


def test_a_processor_has_its_tokenizer_changed_too(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path, "CLIPModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image_processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    cls = type("ByProcessor", (task_class("zero-shot-object-detection"),), {"pipeline": READER})
    changes = TokenizerSpec(add_tokens=("nightly",), padding_side="left")
    task = cls(TaskConfig(Model("m", folder, "0"), cls.Params.model_construct(), tokenizer=changes))
    changed = task.processors["processor"].tokenizer
    assert "nightly" in changed.get_vocab()
    assert changed.padding_side == "left"
    assert "nightly" not in tokenizer.get_vocab()


def test_changes_are_part_of_what_changes_results_and_are_reported(tmp_path: Path, encoder: str) -> None:
    plain, more, left = (
        planned("embedding", encoder, tmp_path, changes)
        for changes in ({}, {"add_tokens": ["nightly", "river"]}, {"truncation_side": "left"})
    )
    assert len({plain.fingerprint, more.fingerprint, left.fingerprint}) == 3
    assert "tokenizer" not in plain.identity
    assert [note for note in more.notes if note.startswith("tokens added to the tokenizer: 1;")]
    assert not [note for note in plain.notes + left.notes if "tokens added" in note]


def test_a_model_without_a_tokenizer_cannot_have_it_changed(tmp_path: Path) -> None:
    folder = tiny_vision(tmp_path / "model", "ViTForImageClassification")
    columns = {"columns": {"image": "text"}}
    with pytest.raises(SpecError, match=r"cannot be used: (?s:.*)tokenizer"):
        planned("image-classification", folder, tmp_path, {"add_tokens": ["nightly"]}, input=columns)


def test_faults_of_changes_name_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        make_spec("embedding", "m", "in", "out", tokenizer={"special_tokens": {"end": "x"}, "side": 1})
    faults = "\n".join(caught.value.faults)
    assert "unknown key 'tokenizer.side' (known here: add_tokens" in faults
    assert "'pad_token'" in faults
