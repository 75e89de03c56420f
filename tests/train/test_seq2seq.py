"""Training summarization, translation and text2text-generation: losses are those of transformers, texts are learnt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LabelSmoother

from hfbatch.tasks import task_class
from hfbatch.train.recipes import RECIPES
from tests.models.text import tiny_bart, tiny_llama, tiny_mbart, tiny_t5
from tests.tasks.drive import make
from tests.tasks.drive import run as predict
from tests.train.drive import Bench

TEXTS = [
    "The engineer reads the blue mountain before dawn.",
    "A quiet river slowly crosses a table of numbers.",
    "Our nightly job does not forget.",
    "Every large cluster reads a table of numbers at 10:45 on Monday.",
    "The engineer slowly crosses the mountain.",
    "A quiet river reads what the model said, word for word.",
]
TARGETS = [
    "engineer reads mountain", "river crosses table", "job does not forget", "cluster reads numbers",
    "engineer crosses the mountain", "river reads what the model said",
]  # fmt: skip
PAIRS = {"text": TEXTS, "target": TARGETS}
MODELS = {"t5": tiny_t5, "bart": tiny_bart, "mbart": tiny_mbart}
LANGUAGES = {"src_lang": "en_XX", "tgt_lang": "de_DE"}
SMALL_START = {"scratch": True, "overrides": {"initializer_factor": 1.0, "dropout_rate": 0.0}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in MODELS.items()}


def bench_of(folders: dict[str, str], kind: str, columns: Any = PAIRS, **options: Any) -> Bench:
    """Translation for the model of many languages, else summaries; texts of at most 40 tokens are written."""
    task = "translation" if kind == "mbart" else "summarization"
    languages = LANGUAGES if kind == "mbart" else {}
    params = {"max_new_tokens": 40, **languages, **options.pop("params", {})}
    return Bench(task, folders[kind], columns, params=params, **options)


def test_encoder_decoder_tasks_can_be_trained() -> None:
    assert {"summarization", "translation", "text2text-generation"} <= set(RECIPES)
    assert "labels" not in RECIPES


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_transformers(folders: dict[str, str], kind: str) -> None:
    bench = bench_of(folders, kind).ready()
    batch = bench.batch()
    own = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    torch.testing.assert_close(bench.loss(batch), bench.model(**own).loss)


def test_a_model_without_a_method_of_its_own_for_it_reads_the_labels_before(tmp_path: Path) -> None:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    from tests.models.text import save, wordpiece_tokenizer

    tokenizer = wordpiece_tokenizer(64)
    sizes = {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = M2M100Config(vocab_size=len(tokenizer), **sizes, **heads, **tokens)
    folder = save(tmp_path, M2M100ForConditionalGeneration(config), tokenizer)
    bench = Bench("text2text-generation", folder, PAIRS).ready()
    batch = bench.batch()
    assert not hasattr(bench.model, "prepare_decoder_input_ids_from_labels")
    own = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    torch.testing.assert_close(bench.loss(batch), bench.model(**own).loss)


def test_the_smoothed_loss_is_that_of_transformers(folders: dict[str, str]) -> None:
    bench = bench_of(folders, "bart", schedule={"label_smoothing": 0.1}).ready()
    batch = bench.batch()
    own = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
    torch.testing.assert_close(
        bench.loss(batch), LabelSmoother(epsilon=0.1)(bench.model(**own), batch["labels"])
    )


@pytest.mark.parametrize("kind", ["t5", "mbart"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_has_the_same_loss_however_it_is_cut(
    folders: dict[str, str], kind: str, smoothing: float
) -> None:
    bench = bench_of(folders, kind, schedule={"label_smoothing": smoothing}).ready()
    whole = bench.batch()
    items = int(whole["labels"].ne(-100).sum())
    parts = [bench.loss(bench.batch(*numbers), items) for numbers in ([0], [1, 2, 3], [4, 5])]
    torch.testing.assert_close(sum(parts), bench.loss(whole))


def test_training_on_pairs_improves_the_metrics(folders: dict[str, str]) -> None:
    columns = {"text": TEXTS, "target": TARGETS}
    model = {"name": folders["t5"], **SMALL_START}
    bench = Bench("summarization", "", columns, model=model, params={"max_new_tokens": 20}).ready()
    before = bench.metrics()
    first, last = bench.learn(steps=100, rate=1e-2)
    after = bench.metrics()
    assert last < first / 4
    assert before["rougeL"] < 0.3 < 0.9 < after["rougeL"]
    assert after["ended"] == 1
    assert 1 < after["perplexity"] < 2 < before["perplexity"]


def test_targets_of_translations_begin_after_the_token_of_their_language(folders: dict[str, str]) -> None:
    bench = bench_of(folders, "mbart").ready()
    tokenizer = AutoTokenizer.from_pretrained(folders["mbart"], **LANGUAGES)
    expected = tokenizer(TEXTS, text_target=TARGETS, truncation=True)
    assert bench.features["input_ids"].to_pylist() == expected["input_ids"]
    assert bench.features["labels"].to_pylist() == expected["labels"]
    german = tokenizer.convert_tokens_to_ids("de_DE")
    assert {labels[0] for labels in expected["labels"]} == {german}
    before = bench.metrics()
    bench.learn(steps=60)
    after = bench.metrics()
    assert before["bleu"] < 5 < 90 < after["bleu"]
    assert before["chrf"] < 20 < 90 < after["chrf"]
    assert bench.model.generation_config.forced_bos_token_id == german
    assert bench.recipe.processor.tgt_lang == "de_DE"


def test_what_is_measured_is_what_the_exported_model_writes(folders: dict[str, str], tmp_path: Path) -> None:
    asked = {"prefix": "said: ", "num_beams": 2, "max_new_tokens": 9}
    bench = bench_of(folders, "bart", params=asked).ready()
    bench.learn(steps=15)
    with torch.no_grad():
        written = [row["text"] for row in bench.recipe.predict(bench.model.eval(), bench.batch()).predictions]
    bench.model.save_pretrained(tmp_path)
    bench.recipe.processor.save_pretrained(tmp_path)
    task = make(task_class("summarization"), str(tmp_path))
    assert task.prefix == "said: "
    assert predict(task, {"text": TEXTS})["summary_text"].to_pylist() == written
    tokens = AutoTokenizer.from_pretrained(tmp_path)([f"said: {text}" for text in TEXTS], padding=True)
    inputs = {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}
    model = type(bench.model).from_pretrained(tmp_path)
    plain = bench.recipe.task.tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert plain == written
    assert len(set(written)) > 1


def test_adapters_have_a_part_in_what_is_written(folders: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    bench = bench_of(folders, "bart").ready()
    plain = bench.metrics()
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    bench.model = get_peft_model(bench.model, config)
    settings = bench.model.get_base_model().generation_config
    bench.learn(steps=100, rate=2e-2)
    assert plain["rougeL"] < 0.3 < 0.6 < bench.metrics()["rougeL"]
    assert bench.model.get_base_model().generation_config is settings


def test_perplexity_counts_tokens_and_knows_no_smoothing(folders: dict[str, str]) -> None:
    quick = {"predict_with_generate": False}
    bench = bench_of(folders, "bart", params=quick, schedule={"label_smoothing": 0.2}).ready()
    assert bench.recipe.metric == "loss"
    own = {name: value for name, value in bench.batch().items() if name != "decoder_input_ids"}
    assert bench.metrics(size=2) == {"perplexity": pytest.approx(math.exp(bench.model(**own).loss.item()))}
    assert bench.recipe.baseline(bench.features) == {}


def test_texts_and_targets_that_are_cut_are_counted(folders: dict[str, str]) -> None:
    rows = {
        "text": ["short", "river " * 100, "short", "river " * 100],
        "target": ["a", "a", "river " * 9, "river " * 9],
    }
    bench = bench_of(folders, "bart", rows, batch={"max_length": 20}, params={"max_target_length": 8})
    made = bench.recipe.features(bench.columns, bench.places)
    assert made.cut is not None
    assert made.cut.tolist() == [False, True, True, True]
    assert made.truncated == 3
    labels = made.table["labels"].to_pylist()
    assert [len(row) for row in labels] == [3, 3, 8, 8]
    assert {row[-1] for row in labels} == {3}
    assert bench.recipe.lengths(made.table).tolist()[1] == 20 + 3
    assert made.table["target"].to_pylist() == rows["target"]


def test_faults_of_rows_name_file_and_row(folders: dict[str, str]) -> None:
    found = bench_of(
        folders, "t5", {"text": ["a", None, " ", "b"], "target": ["x", "y", "z", "\n"]}
    ).validate()
    assert found.rows == 4
    assert found.faults == [
        "rows.parquet row 1: text is null or empty",
        "rows.parquet row 2: text is null or empty",
        "rows.parquet row 3: target is null or empty",
    ]


def test_a_decoder_only_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (fault,) = Bench("summarization", tiny_llama(tmp_path), PAIRS).recipe.check()
    assert "does not support summarization" in fault
    assert "such as T5 or BART" in fault
    assert "with task text-generation" in fault


def test_targets_that_would_never_end_are_refused(tmp_path: Path) -> None:
    folder = tiny_t5(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    (fault,) = Bench("summarization", folder, PAIRS).recipe.check()
    assert "appends no end token (id 3) to a target" in fault


def test_faults_of_params_are_reported_before_work(folders: dict[str, str]) -> None:
    (fault,) = bench_of(folders, "t5", params={"max_target_length": 1000}).recipe.check()
    assert fault == "params.max_target_length 1000 is more than the model's 64 tokens; set at most 64"
    (fault,) = bench_of(folders, "mbart", params={"tgt_lang": "Klingon"}).recipe.check()
    assert "params.tgt_lang 'Klingon' is not a language of the tokenizer" in fault


def test_the_guess_without_a_model_is_the_first_sentence_or_the_text_itself(folders: dict[str, str]) -> None:
    rows = {"text": ["One two. Three four!", "五 六。七"], "target": ["one two", "五 六"]}
    summaries = bench_of(folders, "t5", rows, params={"rouge_words": "any"})
    table = summaries.recipe.features(summaries.columns, summaries.places).table
    assert summaries.recipe.baseline(table) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    same = {
        "text": ["the same words stay", "as they are here"],
        "target": ["the same words stay", "as they are here"],
    }
    translations = bench_of(folders, "mbart", same)
    table = translations.recipe.features(translations.columns, translations.places).table
    assert translations.recipe.baseline(table) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    texts = Bench("text2text-generation", folders["t5"], same)
    table = texts.recipe.features(texts.columns, texts.places).table
    assert texts.recipe.baseline(table) == {"exact_match": 1, "chrf": pytest.approx(100), "wer": 0, "cer": 0}
