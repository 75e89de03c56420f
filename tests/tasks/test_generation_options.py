"""Every option of generation gives each row what `generate` gives it alone, and changes some row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import AutoTokenizer

from hfbatch.tasks import task_class
from hfbatch.tasks.base import Task
from tests.models.text import CORPUS, tiny_llama, tiny_t5
from tests.tasks.drive import features_of, load, make, run

TEXTS = [
    *CORPUS[:4],
    "Every",
    "Every large cluster does not",
    *(f"{first} {second}" for first, second in zip(CORPUS[20:23], CORPUS[40:43], strict=True)),
    "10:45",
    "river",
    "word for word for word for word",
]
LENGTH = {"max_new_tokens": 10, "do_sample": False}
TASKS = {"llama": "text-generation", "t5": "text2text-generation"}
OPTIONS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 5},
    "min_new_tokens": {"min_new_tokens": 8},
    "beams": {"num_beams": 4},
    "early_stopping": {"num_beams": 3, "early_stopping": True},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "short": {"num_beams": 3, "length_penalty": -4.0},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "no_repeat_beams": {"no_repeat_ngram_size": 2, "num_beams": 3, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Llama and a T5 that meet an end every few tokens; the Llama pads with one of them."""
    folders = {
        "llama": tiny_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=256),
        "t5": tiny_t5(tmp_path_factory.mktemp("t5")),
    }
    for kind, ends in (("llama", list(range(30, 52))), ("t5", [3, *range(20, 40)])):
        path = Path(folders[kind]) / "generation_config.json"
        settings = {"eos_token_id": ends} | ({"pad_token_id": ends[0]} if kind == "llama" else {})
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folders


class Alone:
    """The documented use of a model class, one row at a time."""

    def __init__(self, folder: str, kind: str) -> None:
        self.causal = kind == "llama"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        loader = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForSeq2SeqLM
        self.model = loader.from_pretrained(folder, dtype=torch.float32).eval()

    @cached_property
    def free(self) -> list[list[str]]:
        """TEXTS continued without options."""
        return self.texts(TEXTS)

    def inputs(self, text: str) -> Mapping[str, torch.Tensor]:
        return self.tokenizer(text, return_tensors="pt", truncation=True, return_token_type_ids=False)

    def new(self, text: str, **options: Any) -> list[list[int]]:
        """New tokens of each returned sequence, up to its end."""
        inputs = self.inputs(text)
        with torch.inference_mode():
            made = self.model.generate(**inputs, **{**LENGTH, **options})
        rows = made[:, inputs["input_ids"].shape[1] if self.causal else 1 :].tolist()
        ends = self.model.generation_config.eos_token_id
        return [
            row[: next((k + 1 for k, token in enumerate(row) if token in ends), len(row))] for row in rows
        ]

    def texts(self, texts: list[str], **options: Any) -> list[list[str]]:
        return [
            self.tokenizer.batch_decode(self.new(text, **options), skip_special_tokens=True) for text in texts
        ]


@pytest.fixture(scope="module", params=["llama", "t5"])
def pair(request: pytest.FixtureRequest, models: dict[str, str]) -> tuple[str, str, Alone]:
    kind = request.param
    return kind, models[kind], Alone(models[kind], kind)


def task_on(kind: str, folder: str, **params: Any) -> Any:
    alone = {"return_full_text": False} if kind == "llama" else {}
    return make(task_class(TASKS[kind]), folder, **{**LENGTH, **alone, **params})


def written(task: Task, size: int | None = None, texts: list[str] = TEXTS) -> list[Any]:
    assert task.check() == []
    return run(task, {"text": texts}, size)["generated_text"].to_pylist()


BOTH = ("min_new_tokens", "beams", "never", "repetition_penalty", "no_repeat_beams")
"""Options of which a T5 shows too that they count from the start of its own text; the rest is one code for both."""


@pytest.mark.parametrize(
    ("pair", "name"),
    [*(("llama", name) for name in OPTIONS), *(("t5", name) for name in BOTH)],
    indirect=["pair"],
)
def test_a_row_gets_what_it_gets_alone(pair: tuple[str, str, Alone], name: str) -> None:
    kind, folder, alone = pair
    expected = [texts[0] for texts in alone.texts(TEXTS, **OPTIONS[name])]
    assert expected != [texts[0] for texts in alone.free]
    assert len(set(expected)) > 6
    assert written(task_on(kind, folder, **OPTIONS[name])) == expected


def test_beams_return_the_best_of_them(pair: tuple[str, str, Alone]) -> None:
    kind, folder, alone = pair
    options = {"num_beams": 4, "num_return_sequences": 3}
    expected = alone.texts(TEXTS, **options)
    assert all(len(set(texts)) > 1 for texts in expected)
    assert written(task_on(kind, folder, **options)) == expected


def test_bad_words_are_not_written(pair: tuple[str, str, Alone]) -> None:
    kind, folder, alone = pair
    free = alone.free
    tokens = {alone.tokenizer.decode(alone.new(text)[0][1:2]).strip() for text in TEXTS}
    words = tuple(sorted(word for word in tokens if word.isascii() and word.isprintable() and word))
    ids = [alone.tokenizer(text, add_special_tokens=False).input_ids for w in words for text in (w, f" {w}")]
    expected = alone.texts(TEXTS, bad_words_ids=ids)
    assert sum(made != before for made, before in zip(expected, free, strict=True)) > 2
    assert [[text] for text in written(task_on(kind, folder, bad_words=words))] == expected


def test_a_stop_text_ends_its_row_alone(pair: tuple[str, str, Alone]) -> None:
    kind, folder, alone = pair
    free = [texts[0] for texts in alone.free]
    stop = tuple(dict.fromkeys(text[2:4] for text in free if len(text[2:4].strip()) == 2 and text.isascii()))[
        :6
    ]
    options = {"stop_strings": list(stop), "tokenizer": alone.tokenizer}
    expected = [texts[0] for texts in alone.texts(TEXTS, **options)]
    assert sum(made != before for made, before in zip(expected, free, strict=True)) > 2
    assert written(task_on(kind, folder, stop=stop)) == expected
    beams = [texts[0] for texts in alone.texts(TEXTS, **options, num_beams=3)]
    assert written(task_on(kind, folder, stop=stop, num_beams=3)) == beams


def test_every_text_begins_with_what_is_asked(pair: tuple[str, str, Alone]) -> None:
    kind, folder, alone = pair
    begin = alone.tokenizer("the blue", add_special_tokens=False).input_ids
    everything = list(range(len(alone.tokenizer)))
    for options in ({}, {"num_beams": 3}):
        expected = []
        for text in TEXTS:
            width = alone.inputs(text)["input_ids"].shape[1] if alone.causal else 1

            def allowed(_: int, ids: torch.Tensor, width: int = width) -> list[int]:
                step = len(ids) - width
                return [begin[step]] if step < len(begin) else everything

            (made,) = alone.new(text, prefix_allowed_tokens_fn=allowed, **options)
            expected.append(alone.tokenizer.decode(made, skip_special_tokens=True))
        assert len(set(expected)) > 5
        assert written(task_on(kind, folder, begin_with="the blue", **options)) == expected


def test_a_token_that_the_model_forces_comes_before_the_beginning(tmp_path: Path) -> None:
    folder = tiny_t5(tmp_path)
    path = tmp_path / "generation_config.json"
    forced = {"forced_bos_token_id": 7, "output_scores": True, "pad_token_id": -1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **forced}))
    table = run(task_on("t5", folder, begin_with="the blue", log_probs=True), {"text": TEXTS})
    begin = AutoTokenizer.from_pretrained(folder)("the blue", add_special_tokens=False).input_ids
    assert task_on("t5", folder).check() == []
    assert all(ids[: len(begin) + 1] == [7, *begin] for ids in table["token_ids"].to_pylist())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_details_and_log_probs_are_those_of_the_model(
    pair: tuple[str, str, Alone], options: dict[str, Any]
) -> None:
    kind, folder, alone = pair
    task = task_on(kind, folder, details=True, log_probs=True, repetition_penalty=1.3, **options)
    table = run(task, {"text": TEXTS}, 8)
    ends = set(task.decoding.eos_token_id)
    for text, row in zip(TEXTS, table.to_pylist(), strict=True):
        prompt = alone.inputs(text)["input_ids"]
        assert row["prompt_tokens"] == prompt.shape[1]
        names = ("finish_reason", "new_tokens", "token_ids", "log_probs")
        several = zip(*(row[name] for name in names), strict=True) if options else [[row[n] for n in names]]
        for made, (reason, count, ids, found) in zip(
            alone.new(text, repetition_penalty=1.3, **options), several, strict=True
        ):
            assert ids == made
            assert (reason, count) == ("stop" if made[-1] in ends else "length", len(made))
            with torch.inference_mode():
                if alone.causal:
                    whole = torch.cat([prompt, torch.tensor([ids])], dim=1)
                    logits = alone.model(whole).logits[0, prompt.shape[1] - 1 : -1]
                else:
                    start = torch.tensor([[0, *ids[:-1]]])
                    logits = alone.model(input_ids=prompt, decoder_input_ids=start).logits[0]
            expected = logits.log_softmax(-1)[range(count), ids].tolist()
            assert found == pytest.approx(expected, abs=1e-4)
    reasons = table["finish_reason"].to_pylist()
    assert {"stop", "length"} <= set(chain(*reasons) if options else reasons)


ROWS = np.arange(3000)
WARPED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 9.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.2},
}


@pytest.mark.parametrize(
    ("pair", "name"),
    [*(("llama", name) for name in WARPED), ("t5", "temperature"), ("t5", "typical_p")],
    indirect=["pair"],
)
def test_a_draw_follows_the_distribution_that_transformers_draws_from(
    pair: tuple[str, str, Alone], name: str
) -> None:
    kind, folder, alone = pair
    flat = {"do_sample": True, "top_k": 0, "temperature": 3.0}
    options = {**flat, **WARPED[name]}
    task = task_on(kind, folder, **{**options, "max_new_tokens": 1})
    assert task.check() == []
    features = features_of(task, {"text": [TEXTS[0]] * 3000})
    batch = {name: torch.from_numpy(array) for name, array in task.collate(features.table, ROWS, 1).items()}
    with torch.inference_mode():
        tokens = task.forward(alone.model, batch)["tokens"][:, 0]
    drawn = tokens.bincount(minlength=alone.model.config.vocab_size) / len(ROWS)

    def drawn_from(**options: Any) -> torch.Tensor:
        """What generate itself draws the first token from."""
        inputs = alone.inputs(TEXTS[0])
        settings = {"max_new_tokens": 1, "output_scores": True, **options}
        return (
            alone.model.generate(**inputs, **settings, return_dict_in_generate=True).scores[0][0].softmax(-1)
        )

    expected = drawn_from(**options)
    usual = (2 * expected * (1 - expected) / (torch.pi * len(ROWS))).sqrt().sum()  # of as many exact draws
    assert (drawn - expected).abs().sum() < 1.3 * usual + 0.01
    assert not drawn[expected == 0].any()
    assert (drawn - drawn_from(**flat)).abs().sum() > 2 * usual + 0.1


def test_a_draw_depends_on_the_row_alone(pair: tuple[str, str, Alone]) -> None:
    kind, folder, _ = pair
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    task = task_on(kind, folder, **options, repetition_penalty=1.2, no_repeat_ngram_size=2)
    first = written(task, 1)
    assert written(task, 8) == first
    table = run(task, {"text": TEXTS}, 5, order=list(range(len(TEXTS)))[::-1])
    assert table["generated_text"].to_pylist() == first
    assert sum(a != b for a, b in first) > len(TEXTS) / 2
    same = written(task_on(kind, folder, **options), 8, [TEXTS[0]] * 20)
    assert len(set(chain(*same))) > 20


@pytest.mark.parametrize(
    ("params", "messages"),
    [
        ({"temperature": 0.5, "min_p": 0.1}, ["temperature, min_p only work when sampling"]),
        ({"length_penalty": 2.0}, ["length_penalty only work in beam search; set params.num_beams"]),
        ({"num_return_sequences": 2}, ["num_return_sequences=2 would return equal texts"]),
        ({"num_return_sequences": 3, "num_beams": 2}, ["num_return_sequences=3 is more than num_beams=2"]),
        ({"do_sample": True, "num_beams": 2}, ["does not work with num_beams=2"]),
        ({"min_new_tokens": 11}, ["min_new_tokens=11 is more than max_new_tokens=10"]),
        ({"stop": [""], "bad_words": [""]}, ["bad_words holds an empty", "stop holds an empty"]),
        ({"begin_with": CORPUS[0] * 3}, ["more than max_new_tokens=10"]),
        ({"top_k": 3, "early_stopping": True}, ["top_k only work", "early_stopping only work"]),
    ],
)
def test_options_that_contradict_each_other_are_faults(
    pair: tuple[str, str, Alone], params: dict[str, Any], messages: list[str]
) -> None:
    faults = task_on(pair[0], pair[1], **params).check()
    assert len(faults) == len(messages)
    for fault, message in zip(faults, messages, strict=True):
        assert message in fault


def test_what_transformers_refuses_is_a_fault(models: dict[str, str], tmp_path: Path) -> None:
    folder = tiny_t5(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "forced_bos_token_id": 7}))
    task = task_on("t5", folder)
    task.decoding.suppress_tokens = [7]
    (fault,) = task.check()
    assert fault.startswith("transformers refuses these options of generation")


@pytest.mark.parametrize(
    "params",
    [{"min_p": 2}, {"typical_p": 0}, {"epsilon_cutoff": 1}, {"early_stopping": "soon"}, {"num_beams": 0}],
)
def test_options_out_of_range_are_refused(params: dict[str, Any]) -> None:
    for name in TASKS.values():
        with pytest.raises(ValidationError):
            task_class(name).Params.model_validate(params)


def test_columns_have_the_announced_types(pair: tuple[str, str, Alone]) -> None:
    kind, folder, _ = pair
    task = task_on(kind, folder, details=True, log_probs=True, num_beams=2, num_return_sequences=2)
    types = {field.name: str(field.type) for field in task.output_fields()}
    assert types == {
        "generated_text": "list<item: string>",
        "finish_reason": "list<item: string>",
        "prompt_tokens": "int32",
        "new_tokens": "list<item: int32>",
        "token_ids": "list<item: list<item: int32>>",
        "log_probs": "list<item: list<item: float>>",
    }
    assert {*types} == {*task.outputs} - {"parsed"}  # a constraint's column
    assert features_of(task, {"text": TEXTS[:2]}).table.column_names == ["input_ids"]
    assert load(task).config.model_type == kind
