"""Task text-generation, by hand: preprocess, collate, forward, postprocess, compared with the pipeline."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    T5Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
)

from hfbatch.hub.models import Model
from hfbatch.runtime.batching import to_arrow
from hfbatch.tasks.base import TaskConfig
from hfbatch.tasks.generation.chat import is_chat
from hfbatch.tasks.generation.text_generation import TextGeneration
from tests.models.text import CHAT_TEMPLATE, CORPUS, bytes_tokenizer, save, tiny_bert, tiny_llama

GREEDY = {"max_new_tokens": 10, "do_sample": False}
TEXTS = [
    "Every large cluster",
    "A",
    "Our nightly job slowly crosses what the model said, word for word, at 10:45 on Monday.",
    "A quiet river does not forget the blue mountain",
    "",
    "The engineer reads",
    "before dawn",
    "Our nightly job",
]
CHATS = [
    [{"role": "user", "content": "What does the engineer read?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A quiet river crosses what?"}],
    [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "The blue mountain"}],
    [{"role": "user", "content": "x"}],
]
TWO_ENDS = [2, *range(40, 60)]
"""Eos tokens of a model that meets one every few tokens."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2, which unlike Llama puts no bos before a prompt, and learns its positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = bytes_tokenizer(64)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return save(folder, GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)), tokenizer)


def with_settings(folder, target, **settings):
    """A copy of a model with these in its generation_config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = Path(target) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(target)


def task_of(folder, max_length=None, seed=0, **params):
    model = Model(Path(folder).name, str(folder), "commit")
    return TextGeneration(TaskConfig(model, TextGeneration.Params.model_validate(params), max_length, seed))


def places_of(rows, file="a.parquet"):
    return pa.table({"file": pa.array([file] * len(rows)), "row": pa.array(rows, pa.int64())})


class Loaded:
    """A model, with the way of the data around it."""

    def __init__(self, folder):
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def outputs(self, task, columns, size=8, order=None, places=None, multiple=1):
        columns = {name: pa.array(values) for name, values in columns.items()}
        count = len(next(iter(columns.values())))
        features = task.preprocess(columns, places or places_of(range(count)))
        order = np.arange(count) if order is None else np.asarray(order)
        parts = []
        for start in range(0, count, size):
            batch = task.collate(features.table, order[start : start + size], multiple)
            with torch.inference_mode():
                made = task.forward(
                    self.model, {name: torch.from_numpy(array) for name, array in batch.items()}
                )
            parts.append(to_arrow({name: tensor.numpy() for name, tensor in made.items()}, task.ragged))
        back = pa.array(np.argsort(order))
        return pa.concat_tables(parts).combine_chunks().take(back), features, columns

    def texts(self, task, columns, **options):
        outputs, _, columns = self.outputs(task, columns, **options)
        (result,) = task.postprocess(outputs, columns)
        (field,) = task.fields_for(set(columns))
        assert (field.name, field.type) == ("generated_text", result.type)
        return result.to_pylist()

    def oracle(self, inputs, **options):
        return piped(self.folder, json.dumps(inputs), json.dumps(options))


@cache
def piped(folder, inputs, options):
    """What the pipeline gives for each row alone, computed once for all tests; inputs and options are JSON."""
    generator = pipeline("text-generation", model=folder, dtype=torch.float32, device="cpu")
    return [generator(row, **json.loads(options))[0]["generated_text"] for row in json.loads(inputs)]


@pytest.mark.parametrize(("full", "size"), [(None, 1), (None, 8), (True, 3), (False, 1), (False, 8)])
def test_prompts_of_mixed_lengths_give_what_the_pipeline_gives(llama, size, full):
    loaded = Loaded(llama)
    made = loaded.texts(task_of(llama, return_full_text=full, **GREEDY), {"text": TEXTS}, size=size)
    assert made == loaded.oracle(TEXTS, return_full_text=full, **GREEDY)


@pytest.mark.parametrize("multiple", [1, 8])
def test_learned_positions_and_empty_prompts_give_what_the_pipeline_gives(gpt2, multiple):
    loaded = Loaded(gpt2)
    short = [text[:60] for text in TEXTS]
    made = loaded.texts(task_of(gpt2, **GREEDY), {"text": short}, multiple=multiple)
    assert made == loaded.oracle(short, **GREEDY)
    assert short[4] == ""
    assert made[4]


@pytest.mark.parametrize("eos", [2, TWO_ENDS])
@pytest.mark.parametrize("size", [1, 8])
def test_rows_stop_at_their_own_eos(llama, tmp_path, eos, size):
    folder = with_settings(llama, tmp_path, eos_token_id=eos)
    loaded = Loaded(folder)
    task = task_of(folder, **GREEDY)
    outputs, _, columns = loaded.outputs(task, {"text": TEXTS}, size=size)
    assert task.postprocess(outputs, columns)[0].to_pylist() == loaded.oracle(TEXTS, **GREEDY)
    if eos == TWO_ENDS:
        assert len(set(outputs["length"].to_pylist())) > 2
    assert task.measure(outputs, []).tolist() == [float(length) for length in outputs["length"].to_pylist()]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("full", [True, False])
def test_chats_and_prefilled_replies_give_what_the_pipeline_gives(llama, size, full):
    loaded = Loaded(llama)
    made = loaded.texts(task_of(llama, return_full_text=full, **GREEDY), {"messages": CHATS}, size=size)
    assert made == loaded.oracle(CHATS, return_full_text=full, **GREEDY)
    if full:
        assert [message["role"] for message in made[0]] == ["user", "assistant"]
        assert made[2][-1]["content"].startswith("The blue mountain")
        assert len(made[2]) == 2


@pytest.mark.parametrize("size", [1, 3, 8])
def test_repetition_penalty_does_not_see_the_padding(llama, size):
    loaded = Loaded(llama)
    options = {**GREEDY, "repetition_penalty": 1.8}
    made = loaded.texts(task_of(llama, **options), {"text": TEXTS}, size=size)
    assert made == loaded.oracle(TEXTS, **options)
    assert made != loaded.texts(task_of(llama, **GREEDY), {"text": TEXTS})


def test_a_row_samples_the_same_in_any_batch_order_and_company(llama):
    loaded = Loaded(llama)
    task = task_of(llama, do_sample=True, temperature=1.5, max_new_tokens=10)
    expected = loaded.texts(task, {"text": TEXTS}, size=1)
    assert loaded.texts(task, {"text": TEXTS}, size=8) == expected
    assert loaded.texts(task, {"text": TEXTS}, size=3, order=[5, 2, 7, 0, 4, 1, 6, 3]) == expected
    assert loaded.texts(task, {"text": TEXTS}, size=3, multiple=8) == expected
    alone = loaded.texts(task, {"text": TEXTS[5:6]}, places=places_of([5]))
    assert alone == expected[5:6]


def test_another_place_or_seed_samples_another_text(llama):
    loaded = Loaded(llama)
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 10}
    same = {"text": ["Every large cluster"] * 8}
    first = loaded.texts(task_of(llama, **options), same)
    assert len(set(first)) == 8
    assert set(loaded.texts(task_of(llama, seed=1, **options), same)).isdisjoint(first)
    elsewhere = places_of(range(8), "b.parquet")
    assert set(loaded.texts(task_of(llama, **options), same, places=elsewhere)).isdisjoint(first)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "top_k": 50}, {"temperature": 1.3, "top_k": 12, "top_p": 0.8}, {"top_k": 0}],
)
def test_sampling_draws_from_the_warped_softmax(llama, options):
    loaded = Loaded(llama)
    rows = 4000
    task = task_of(llama, do_sample=True, max_new_tokens=1, **options)
    outputs, features, _ = loaded.outputs(task, {"text": ["The engineer reads"] * rows}, size=1000)
    drawn = np.bincount(outputs["tokens"].combine_chunks().flatten().to_numpy(), minlength=400) / rows
    ids = torch.tensor([features.table["input_ids"][0].as_py()])
    with torch.inference_mode():
        logits = loaded.model(ids).logits[:, -1]
    steps = [TemperatureLogitsWarper(options.get("temperature", 0.7))]
    steps += [TopKLogitsWarper(options["top_k"])] if options["top_k"] else []
    steps += [TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    expected = LogitsProcessorList(steps)(ids, logits).softmax(dim=-1)[0].numpy()
    assert np.abs(drawn[: len(expected)] - expected).sum() / 2 < 0.03
    assert not drawn[: len(expected)][expected == 0].any()


def test_sampling_among_one_token_is_greedy(llama):
    loaded = Loaded(llama)
    sampled = loaded.texts(task_of(llama, do_sample=True, top_k=1, max_new_tokens=10), {"text": TEXTS})
    assert sampled == loaded.texts(task_of(llama, **GREEDY), {"text": TEXTS})


@pytest.mark.parametrize("column", [{"text": TEXTS}, {"messages": CHATS}])
def test_several_sequences_come_as_a_list_for_each_row(llama, tmp_path, column):
    folder = with_settings(llama, tmp_path, eos_token_id=TWO_ENDS)
    loaded = Loaded(folder)
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    task = task_of(folder, num_return_sequences=3, **options)
    made = loaded.texts(task, column, size=3)
    assert [len(sequences) for sequences in made] == [3] * len(made)
    assert made == loaded.texts(task, column, size=1)
    assert [sequences[0] for sequences in made] == loaded.texts(task_of(folder, **options), column)
    assert sum(len({str(text) for text in sequences}) > 1 for sequences in made) > len(made) / 2


def test_long_prompts_lose_their_beginning_and_are_counted(llama):
    loaded = Loaded(llama)
    long = " ".join(CORPUS)
    task = task_of(llama, max_new_tokens=28, do_sample=False)
    outputs, features, columns = loaded.outputs(task, {"text": [long, "before dawn"]})
    assert features.truncated == 1
    assert task.lengths(features.table).tolist()[0] == 100
    ids = features.table["input_ids"][0].as_py()
    assert ids[0] == 1
    assert long.endswith(task.tokenizer.decode(ids, skip_special_tokens=True))
    assert task.postprocess(outputs, columns)[0][0].as_py().startswith(long)
    limited = task_of(llama, max_length=10, max_new_tokens=28, do_sample=False)
    assert limited.lengths(loaded.outputs(limited, {"text": [long]})[1].table).tolist() == [10]


def test_a_long_chat_is_cut_from_the_left_and_counted(llama):
    chat = [{"role": "user", "content": " ".join(CORPUS)}]
    task = task_of(llama, max_new_tokens=28, do_sample=False)
    features = task.preprocess({"messages": pa.array([chat])}, places_of([0]))
    assert features.truncated == 1
    assert task.tokenizer.decode(features.table["input_ids"][0].as_py()).endswith("</s><|assistant|>")


def test_an_empty_prompt_without_bos_raises(gpt2, tmp_path):
    folder = with_settings(gpt2, tmp_path, bos_token_id=None)
    with pytest.raises(ValueError, match="no bos_token_id"):
        task_of(folder).preprocess({"text": pa.array(["a", ""])}, places_of([0, 1]))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "user", "content": None}], "a message has no content"),
        ([{"role": None, "content": "x"}], "a message has no role"),
        ([None, {"role": "user", "content": "x"}], "null message"),
    ],
)
def test_a_broken_chat_raises(llama, chat, message):
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    with pytest.raises(ValueError, match=message):
        task_of(llama).preprocess({"messages": pa.array([chat], kind)}, places_of([0]))


def test_no_rows_give_no_features(llama):
    features = task_of(llama).preprocess({"text": pa.array([], pa.string())}, places_of([]))
    assert len(features.table) == 0
    assert features.table.schema.names == ["input_ids", "seed"]


def test_what_is_left_open_comes_from_the_model_then_from_the_pipeline(llama, tmp_path):
    plain = task_of(llama)
    assert plain.check() == []
    assert (plain.decoding.do_sample, plain.decoding.temperature, plain.decoding.top_k) == (True, 0.7, 50)
    assert plain.decoding.max_new_tokens == 64
    assert "samples with temperature 0.7" in plain.notes()[0]
    settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": 4, "penalty_alpha": 0.6}
    folder = with_settings(llama, tmp_path, **settings)
    own = task_of(folder)
    assert (own.decoding.do_sample, own.decoding.max_new_tokens) == (False, 5)
    assert "searches 4 beams, as the model says (params.num_beams)" in own.notes()
    assert "not followed from the model's generation_config: penalty_alpha=0.6" in own.notes()
    assert task_of(folder, max_new_tokens=9).decoding.max_new_tokens == 9


def test_a_sampling_model_searches_its_beams_without_a_warning(llama, tmp_path, capfd):
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "min_p": 0.1,
        "max_length": 20,
        "num_beams": 3,
    }
    folder = with_settings(llama, tmp_path, **settings)
    loaded = Loaded(folder)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = loaded.texts(task_of(folder, **GREEDY), {"text": TEXTS})
    assert capfd.readouterr() == ("", "")
    assert made == Loaded(llama).oracle(TEXTS, num_beams=3, **GREEDY)


def test_a_probe_generates_no_more_than_a_few_tokens(llama):
    loaded = Loaded(llama)
    task = task_of(llama, max_new_tokens=50)
    features = task.preprocess({"text": pa.array(TEXTS)}, places_of(range(8)))
    batch = {
        name: torch.from_numpy(array) for name, array in task.collate(features.table, np.arange(8), 8).items()
    }
    assert task.trial_forward(loaded.model, batch)["tokens"].shape == (8, 8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"do_sample": False, "temperature": 0.5},
            "temperature only work when sampling; set params.do_sample=true",
        ),
        (
            {"do_sample": False, "num_return_sequences": 2},
            "params.num_return_sequences=2 would return equal texts",
        ),
        ({"max_new_tokens": 128}, "leaves no room for a prompt within the model's 128 tokens"),
    ],
)
def test_params_that_cannot_work_are_faults(llama, params, message):
    (fault,) = task_of(llama, **params).check()
    assert message in fault


@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"beams": 2}])
def test_params_out_of_range_are_refused(params):
    with pytest.raises(ValidationError):
        TextGeneration.Params.model_validate(params)


def test_models_that_do_not_continue_text_are_refused(llama, tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    bytes_tokenizer().save_pretrained(tmp_path / "t5")
    (fault,) = task_of(tmp_path / "t5").check()
    assert "encoder-decoder, which is text2text-generation" in fault
    (fault,) = task_of(tiny_bert(tmp_path / "bert")).check()
    assert "BertForSequenceClassification) is not a causal language model" in fault
    assert task_of(llama).check() == []


def test_exactly_one_input_and_a_chat_template_are_needed(llama, gpt2):
    assert "--column text=COLUMN" in task_of(llama).column_faults(set())[0]
    assert "both in input" in task_of(llama).column_faults({"text", "messages"})[0]
    assert task_of(llama).column_faults({"messages"}) == []
    assert "no chat template" in task_of(gpt2).column_faults({"messages"})[0]


def test_the_columns_that_count_as_chats():
    assert is_chat(pa.array(CHATS).type)
    assert is_chat(pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.string())])))
    assert not is_chat(pa.string())
    assert not is_chat(pa.list_(pa.string()))
    assert not is_chat(pa.list_(pa.struct([("role", pa.string())])))


def test_byte_level_text_survives_any_prompt(llama):
    assert isinstance(task_of(llama).tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    loaded = Loaded(llama)
    odd = ["ünïcode ✓", "\n\n", "<s>", "  two  spaces  "]
    assert loaded.texts(task_of(llama, **GREEDY), {"text": odd}) == loaded.oracle(odd, **GREEDY)
