"""Training text-generation: what is learnt, token by token; losses are those of transformers, packed or not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from hfbatch.errors import SpecError
from hfbatch.spec.finetune import FinetuneSpec
from hfbatch.tasks.generation.text_generation import TextGeneration
from hfbatch.train.data.chats import answer_tokens
from hfbatch.train.plan import make_finetune_plan
from hfbatch.train.recipes.text_generation import PACKABLE, TextGenerationRecipe
from tests.models.text import CHAT_TEMPLATE, CORPUS, bytes_tokenizer, save, tiny_bert_for, tiny_llama
from tests.tasks.drive import features_of, make
from tests.train.drive import Bench

MARKED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'Hm. ' }}{% endif %}{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Who reads?"}, {"role": "assistant", "content": CORPUS[0]}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "When? "},
        {"role": "assistant", "content": " before dawn "},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "\nthe blue mountain"},
        {"role": "user", "content": "Thanks"},
    ],
]
ROWS: dict[str, dict[str, list[Any]]] = {
    "text": {"text": CORPUS[:6]},
    "pairs": {
        "prompt": [text[:-12] for text in CORPUS[:6]],
        "completion": [text[-12:] for text in CORPUS[:6]],
    },
    "chats": {"messages": [CHATS[0], CHATS[1], [*CHATS[1][:3]]]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("marked"), chat_template=MARKED_TEMPLATE)


def bench_of(model: str, columns: dict[str, Any], **options: Any) -> Bench:
    return Bench("text-generation", model, columns, **options).ready()


def targets_in(bench: Bench) -> list[list[str]]:
    """Tokens of each row, those that are learnt in brackets."""
    names = bench.recipe.task.tokenizer.convert_ids_to_tokens
    return [
        [f"[{token}]" if label != -100 else token for token, label in zip(names(ids), labels, strict=True)]
        for ids, labels in zip(
            *(bench.features[name].to_pylist() for name in ("input_ids", "labels")), strict=True
        )
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_the_loss_is_that_of_transformers(llama: str, kind: str) -> None:
    bench = bench_of(llama, ROWS[kind])
    batch = bench.batch()
    assert batch["attention_mask"].min() == 0
    torch.testing.assert_close(bench.loss(batch), bench.model(**batch).loss)
    torch.testing.assert_close(bench.loss(batch, 77), bench.model(**batch, num_items_in_batch=77).loss)


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_has_the_same_loss_however_it_is_cut(llama: str, packing: bool) -> None:
    bench = bench_of(llama, {"text": CORPUS[:30]}, batch={"max_length": 60}, params={"packing": packing})
    whole = bench.batch()
    items = int(whole["labels"].ne(-100).sum())
    rows = len(bench.features)
    parts = [bench.loss(bench.batch(*numbers), items) for numbers in ([0], range(1, 4), range(4, rows))]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


@pytest.mark.parametrize("kind", ROWS)
def test_training_on_rows_improves_the_metrics(llama: str, kind: str) -> None:
    bench = bench_of(llama, ROWS[kind])
    first, last = bench.learn(40)
    assert last < first / 2
    found, batch = bench.metrics(), bench.batch()
    with torch.no_grad():
        outputs = bench.model(**batch)
    assert found["perplexity"] == pytest.approx(float(outputs.loss.exp()), rel=1e-5)
    asked = batch["labels"][:, 1:] != -100
    right = outputs.logits[:, :-1].argmax(-1)[asked] == batch["labels"][:, 1:][asked]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))


def test_all_tokens_of_a_text_and_its_end_are_targets(llama: str) -> None:
    (tokens,) = targets_in(bench_of(llama, {"text": ["a b"]}))
    assert tokens == ["<s>", "[a]", "[Ġb]", "[</s>]"]


def test_of_a_prompt_and_its_completion_the_completion_is_the_target(llama: str) -> None:
    bench = bench_of(llama, {"prompt": ["a b"], "completion": [" c"]})
    assert targets_in(bench) == [["<s>", "a", "Ġb", "[Ġc]", "[</s>]"]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "<|user|>hi</s><|assistant|>[yes][</s>]<|user|>so</s><|assistant|>[no][</s>]"),
        ("marked", "<|user|>hi\n<|assistant|>[yes][</s>]\n<|user|>so\n<|assistant|>[no][</s>]\n"),
    ],
)
def test_of_a_chat_the_turns_of_the_assistant_are_targets(
    llama: str, marked: str, template: str, expected: str
) -> None:
    words = ["hi", "yes", "so", "no", "bye"]
    chat = [{"role": ("user", "assistant")[k % 2], "content": word} for k, word in enumerate(words)]
    bench = bench_of(marked if template == "marked" else llama, {"messages": [chat]})
    (tokens,) = targets_in(bench)
    text = "".join(tokens).replace("Ċ", "\n")
    for word in ("yes", "no"):  # words of several tokens
        parts = bench.recipe.task.tokenizer.tokenize(word)
        text = text.replace("".join(f"[{part}]" for part in parts), f"[{word}]")
    assert text == expected


def test_a_token_that_reaches_into_an_answer_is_a_target() -> None:
    tokenizer, text = bytes_tokenizer(), "so the end"
    tokens = tokenizer.tokenize(text)
    ((ids, trained),) = answer_tokens(tokenizer, [text], [[(3, 6)]])
    marked = [token for token, mark in zip(tokens, trained, strict=True) if mark]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert marked == ["Ġthe"]


def test_targets_of_chats_are_what_transformers_marks(marked: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(marked)
    bench = bench_of(marked, {"messages": CHATS})
    for row, chat in enumerate(CHATS):
        until = max(place for place, message in enumerate(chat) if message["role"] == "assistant") + 1
        expected = tokenizer.apply_chat_template(
            chat[:until], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, labels = (bench.features[name][row].as_py() for name in ("input_ids", "labels"))
        assert sum(expected["assistant_masks"]) > 5
        assert ids == expected["input_ids"]
        assert [label != -100 for label in labels] == [bool(mark) for mark in expected["assistant_masks"]]


def test_what_comes_before_an_answer_is_what_prediction_gives_the_model(llama: str) -> None:
    chats, pairs = bench_of(llama, {"messages": CHATS}), bench_of(llama, ROWS["pairs"])
    ends = [(0, 1), (1, 2), (1, 4)]  # chat, and how many of its messages ask for an answer
    prompts = features_of(make(TextGeneration, llama), {"messages": [CHATS[row][:end] for row, end in ends]})
    for (row, _), prompt in zip(ends, prompts.table["input_ids"].to_pylist(), strict=True):
        ids, labels = (chats.features[name][row].as_py() for name in ("input_ids", "labels"))
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != -100 == labels[len(prompt) - 1]
    prompts = features_of(make(TextGeneration, llama), {"text": ROWS["pairs"]["prompt"]})
    for row, prompt in enumerate(prompts.table["input_ids"].to_pylist()):
        ids, labels = (pairs.features[name][row].as_py() for name in ("input_ids", "labels"))
        assert ids[: len(prompt)] == prompt
        assert [label != -100 for label in labels] == [False] * len(prompt) + [True] * (
            len(ids) - len(prompt)
        )


def test_nothing_of_a_long_text_is_lost(llama: str) -> None:
    text = " ".join(CORPUS[:8])
    bench = bench_of(llama, {"text": [text, "a b"]}, batch={"max_length": 16})
    *windows, short = bench.features["input_ids"].to_pylist()
    assert len(short) == 4
    joined = windows[0] + [token for ids in windows[1:] for token in ids[1:]]
    assert joined == [*bench.recipe.task.tokenizer(text)["input_ids"], 2]
    assert all(one[-1] == other[0] for one, other in pairwise(windows))
    trained = [label for labels in bench.features["labels"].to_pylist() for label in labels if label != -100]
    assert trained == [*joined[1:], *short[1:]]
    assert bench.features["hfbatch_row"].to_pylist() == [0] * len(windows) + [1]


def test_rows_that_are_too_long_lose_their_beginning_and_are_counted(llama: str) -> None:
    pairs = {"prompt": [CORPUS[0] * 3, "a b", "a"], "completion": [" c", " c", CORPUS[0] * 9]}
    bench = Bench("text-generation", llama, pairs, batch={"max_length": 12})
    made = bench.recipe.features(bench.columns, bench.places)
    assert made.cut is not None
    assert made.cut.tolist() == [True, False, True]
    long, short, answer = made.table["input_ids"].to_pylist()
    tokens = bench.recipe.task.tokenizer(CORPUS[0] * 3)["input_ids"]
    assert long == [
        1,
        *tokens[-9:],
        *bench.recipe.task.tokenizer(" c", add_special_tokens=False)["input_ids"],
        2,
    ]
    assert len(short) == 5
    assert [label != -100 for label in made.table["labels"][2].as_py()] == [False, False] + [True] * 10
    assert len(answer) == 12
    whole = bench_of(llama, {"messages": CHATS})
    bench = Bench("text-generation", llama, {"messages": CHATS}, batch={"max_length": 12})
    made = bench.recipe.features(bench.columns, bench.places)
    assert made.truncated == 2
    for ids, uncut in zip(
        made.table["input_ids"].to_pylist(), whole.features["input_ids"].to_pylist(), strict=True
    ):
        assert ids == uncut[-12:]


SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Of a tiny decoder; a name that a config has not is passed over."""
MORE_SIZES = {
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=sorted(PACKABLE))
def packable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of each type that packing is offered for."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    config = transformers.AutoConfig.for_model(request.param, **SIZES, **MORE_SIZES, **tokens)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return save(tmp_path_factory.mktemp(request.param), model, bytes_tokenizer(128))


def test_packed_rows_have_the_loss_that_they_have_apart(packable: str) -> None:
    columns = {"text": CORPUS[:20]}
    apart = bench_of(packable, columns, batch={"max_length": 64})
    packed = bench_of(packable, columns, batch={"max_length": 64}, params={"packing": True})
    assert len(packed.features) < len(apart.features) / 2
    batches = apart.batch(), packed.batch()
    items = [int(batch["labels"].ne(-100).sum()) for batch in batches]
    assert items[0] == items[1]
    torch.testing.assert_close(packed.loss(batches[1]), apart.loss(batches[0]), rtol=1e-5, atol=1e-5)
    assert packed.metrics() == pytest.approx(apart.metrics(), rel=1e-4)
    mixed = {name: value for name, value in batches[1].items() if name != "attention_mask"}
    mixed["attention_mask"] = torch.ones_like(mixed["input_ids"])
    with torch.no_grad():
        assert abs(packed.loss(mixed) - apart.loss(batches[0])) > 1e-3  # what a plain mask would make of it


@pytest.mark.parametrize("kind", ROWS)
def test_packed_rows_have_the_gradients_that_they_have_apart(llama: str, kind: str) -> None:
    blocks: list[int] = []
    gradients = []
    for packing in (False, True):
        bench = bench_of(llama, ROWS[kind], batch={"max_length": 100}, params={"packing": packing})
        bench.loss(bench.batch()).backward()
        blocks.append(len(bench.features))
        gradients.append([weight.grad for weight in bench.model.parameters()])
    assert blocks[0] > blocks[1]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packing_keeps_every_row_once_and_fills_blocks(llama: str) -> None:
    bench = bench_of(llama, {"text": CORPUS}, batch={"max_length": 128}, params={"packing": True})
    apart = bench_of(llama, {"text": CORPUS})
    rows = []
    for ids, pieces in zip(
        *(bench.features[name].to_pylist() for name in ("input_ids", "pieces")), strict=True
    ):
        assert sum(pieces) == len(ids) <= 128
        for piece in pieces:
            rows.append(tuple(ids[:piece]))
            ids = ids[piece:]
    assert sorted(rows) == sorted(map(tuple, apart.features["input_ids"].to_pylist()))
    assert sum(map(len, rows)) / (128 * len(bench.features)) > 0.9


def test_packing_is_refused_where_it_would_mix_rows(llama: str, tmp_path: Path) -> None:
    packed = {"packing": True}
    (fault,) = Bench("text-generation", llama, {"text": ["a"]}, params=packed).recipe.check()
    assert "set batch.max_length" in fault
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=400)
    )
    folder = save(tmp_path / "bloom", bloom, bytes_tokenizer(128))
    (fault,) = Bench("text-generation", folder, {"text": ["a"]}, params=packed).recipe.check()
    assert "'bloom' are not known to keep joined rows apart" in fault
    mistral = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**SIZES, **MORE_SIZES, sliding_window=32)
    )
    folder = save(tmp_path / "mistral", mistral, bytes_tokenizer(128))
    options: dict[str, Any] = {"params": packed, "batch": {"max_length": 64}}
    (fault,) = Bench("text-generation", folder, {"text": ["a"]}, **options).recipe.check()
    assert "at most 32" in fault
    options["batch"] = {"max_length": 32}
    assert Bench("text-generation", folder, {"text": ["a"]}, **options).recipe.check() == []


def test_faults_of_rows_name_file_and_row(llama: str, tmp_path: Path) -> None:
    pairs = {"prompt": ["a", None, "b"], "completion": ["", "c", "d"]}
    assert Bench("text-generation", llama, pairs).validate().faults == [
        "rows.parquet row 1: prompt is null or empty",
        "rows.parquet row 0: completion is null or empty",
    ]
    ask, answer = CHATS[0]
    chats = [None, [], [ask], [answer], [ask, {"role": "assistant", "content": None}], CHATS[1]]
    assert Bench("text-generation", llama, {"messages": chats}).validate().faults == [
        "rows.parquet row 0: messages is null",
        "rows.parquet row 1: messages is empty",
        "rows.parquet row 2: messages has no turn of the assistant, so there is nothing to train on",
        "rows.parquet row 3: messages begins with a turn of the assistant; leave it out, or put a user's turn before it",
        "rows.parquet row 4: a message has no content",
    ]
    forgetful = tiny_llama(tmp_path, chat_template=FORGETFUL_TEMPLATE)
    (fault,) = Bench("text-generation", forgetful, {"messages": CHATS}).validate().faults
    assert "row 1: the chat template renders a turn differently if others follow" in fault


def test_rows_of_one_kind_are_read(llama: str, tmp_path: Path) -> None:
    recipe = Bench("text-generation", llama, {"text": ["a"]}).recipe
    for good in ({"text"}, {"prompt", "completion"}, {"messages"}):
        assert recipe.column_faults(good) == []
    expected = {
        frozenset(): "no column to train on",
        frozenset(
            {"prompt", "messages"}
        ): "columns 'prompt' and 'messages' are present; map those to train on",
        frozenset({"completion"}): "prompt and completion go together, and prompt is missing",
    }
    for present, words in expected.items():
        (fault,) = recipe.column_faults(set(present))
        assert words in fault
    there = {name: name for name in ("text", "prompt", "completion", "messages")}
    assert recipe.choose(there, set()) == there
    assert set(recipe.choose(there, {"completion"})) == {"prompt", "completion"}
    plain = Bench("text-generation", tiny_llama(tmp_path), {"text": ["a"]}).recipe
    assert "no chat template" in plain.column_faults({"messages"})[0]


def test_a_mapped_column_says_what_is_trained_on(llama: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "messages": CHATS}), rows)
    values = {"task": "text-generation", "model": llama, "output": str(tmp_path / "out")}
    with pytest.raises(SpecError, match="columns 'text' and 'messages' are present; map those to train on"):
        make_finetune_plan(FinetuneSpec.build({**values, "train": str(rows)}))
    source = {"path": str(rows), "columns": {"messages": "messages"}}
    plan = make_finetune_plan(FinetuneSpec.build({**values, "train": source}))
    assert plan.train.columns == plan.eval.columns == {"messages": "messages"}


def test_a_template_of_the_params_is_used_and_saved(marked: str, tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path)
    bench = Bench("text-generation", plain, {"messages": CHATS}, params={"chat_template": MARKED_TEMPLATE})
    recipe = bench.recipe
    assert isinstance(recipe, TextGenerationRecipe)
    assert recipe.column_faults({"messages"}) == []
    made = recipe.features(bench.columns, bench.places).table
    assert made["labels"].to_pylist() == bench_of(marked, {"messages": CHATS}).features["labels"].to_pylist()
    assert recipe.processor.chat_template == MARKED_TEMPLATE
    assert recipe.processor.truncation_side == "right"


def test_params_and_models_that_cannot_work_are_faults(llama: str, tmp_path: Path) -> None:
    (fault,) = Bench(
        "text-generation", llama, {"text": ["a"]}, params={"chat_template_kwargs": {"tokenize": False}}
    ).recipe.check()
    assert "cannot set tokenize" in fault
    (fault,) = Bench("text-generation", tiny_bert_for(tmp_path, "MaskedLM"), {"text": ["a"]}).recipe.check()
    assert "is not a causal language model" in fault
    assert Bench(
        "text-generation", llama, {"text": pa.array([None, "a"]).dictionary_encode()}
    ).validate().faults == ["rows.parquet row 0: text is null or empty"]
