"""Adapters on a frozen base: what they train, how they are saved, merged and gone on with; and heads alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from peft.utils.integrations import dequantize_module_weight
from safetensors.numpy import load_file, save_file

from hfbatch.engines.adapters import plain_lora_faults
from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.spec.job import ModelSpec
from hfbatch.train.data.rows import LENGTH, ROW
from hfbatch.train.loop import adapters
from hfbatch.train.loop.adapters import (
    head_weights,
    linear_layers,
    method_faults,
    save_adapter,
    trained_modules,
)
from hfbatch.train.loop.checkpoints import Checkpoints
from hfbatch.train.loop.loop import train
from hfbatch.train.loop.model import load_adapted, trainable
from hfbatch.train.loop.worker_config import TrainWorkerConfig
from tests.models import text
from tests.train.drive import Bench

TEXTS = ["a lovely film", "never again", "so so", "I would see it twice", "what a bore it was", "fine"]
ROWS = {"text": TEXTS, "label": ["good", "bad", "fair", "good", "bad", "fair"]}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QLORA4, QLORA8 = {"name": "qlora"}, {"name": "qlora", "bits": 8}


def tiny_gpt2(folder: Path) -> str:
    tokenizer = text.bytes_tokenizer(64)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    return text.save(folder, transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), tokenizer)


def tiny_distilbert(folder: Path) -> str:
    tokenizer = text.wordpiece_tokenizer(64)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    return text.save(folder, transformers.DistilBertModel(config), tokenizer)


def tiny_t5(folder: Path) -> str:
    tokenizer = text.wordpiece_tokenizer(64)
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": len(tokenizer),
    }
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens))
    return text.save(folder, model, tokenizer)


MODELS: dict[str, Callable[[Path], str]] = {
    "bert": text.tiny_bert_encoder,
    "distilbert": tiny_distilbert,
    "gpt2": tiny_gpt2,
    "llama": text.tiny_llama,
    "t5": tiny_t5,
}
LINEAR = {
    "bert": 2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 32),
    "distilbert": 2 * (4 * (32 + 32) + 2 * (32 + 64)),
    "gpt2": 2 * ((32 + 96) + (32 + 32) + 2 * (32 + 128)),
    "llama": 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)),
    "t5": 2 * (4 * (32 + 32) + 2 * (32 + 64)) + 2 * (8 * (32 + 32) + 2 * (32 + 64)),
}
"""Sum of inputs and outputs over the linear layers of the base."""
HEADS = {
    "bert": {"classifier": 32 * 3 + 3},
    "distilbert": {"pre_classifier": 32 * 32 + 32, "classifier": 32 * 3 + 3},
    "gpt2": {"score": 32 * 3},
    "llama": {"score": 32 * 3},
    "t5": {"classification_head.dense": 32 * 32 + 32, "classification_head.out_proj": 32 * 3 + 3},
}
"""Modules of the head and their weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}


def logits(model: Any, bench: Bench) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            **{name: value for name, value in bench.batch().items() if name != "labels"}
        ).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_head_alone_is_trained(folders: dict[str, str], name: str) -> None:
    bench = Bench("text-classification", folders[name], ROWS, method="head").ready()
    pooler = {"bert.pooler.dense": 32 * 32 + 32} if name == "bert" else {}
    head = HEADS[name] | pooler
    changing = [key for key, weight in bench.model.named_parameters() if weight.requires_grad]
    assert {key.rpartition(".")[0] for key in changing} == set(head)
    assert trainable(bench.model)[0] == sum(head.values())
    first, last = bench.learn(steps=5)
    assert last < first


@pytest.mark.parametrize("name", MODELS)
def test_adapters_train_and_merge_into_a_plain_model(
    folders: dict[str, str], name: str, tmp_path: Path
) -> None:
    bench = Bench("text-classification", folders[name], ROWS, method={"name": "lora", "rank": 4}).ready()
    assert trainable(bench.model)[0] == 4 * LINEAR[name] + sum(HEADS[name].values())
    frozen = {key: weight for key, weight in bench.model.named_parameters() if not weight.requires_grad}
    before = {key: weight.clone() for key, weight in frozen.items()}
    first, last = bench.learn(steps=12)
    assert last < first * 0.9
    assert all(torch.equal(weight, before[key]) for key, weight in frozen.items())

    save_adapter(bench.model, "org/base", None, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    merged = load_adapted(bench.spec, bench.recipe, tmp_path / "adapter").merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "model")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    trained = logits(bench.model, bench)
    torch.testing.assert_close(logits(merged, bench), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(plain, bench), logits(merged, bench), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_of_a_model_that_writes_texts_runs_in_vllm(
    folders: dict[str, str], name: str, tmp_path: Path
) -> None:
    bench = Bench("text-generation", folders[name], {"text": TEXTS}, method="lora").ready()
    save_adapter(bench.model, folders[name], None, tmp_path)
    assert plain_lora_faults("model", str(tmp_path), "vllm") == []
    assert pin(ModelSpec(name=str(tmp_path)), adapters=True).folder == folders[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [QLORA4, QLORA8], ids=["4 bits", "8 bits"])
def test_a_quantised_base_is_written_out_for_the_merge(
    folders: dict[str, str], name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    bench = Bench("text-classification", folders[name], ROWS, method=method).ready()
    quantised = {kind for kind in map(type, bench.model.modules()) if "bitsandbytes" in kind.__module__}
    assert quantised
    heads = [weight for key, weight in bench.model.named_parameters() if ".modules_to_save." in key]
    assert {weight.dtype for weight in heads} == {torch.float32}
    state = {key: value.clone() for key, value in bench.model.state_dict().items() if ".base_layer." in key}
    first, last = bench.learn(steps=8)
    assert last < first
    trained = logits(bench.model, bench)
    after = bench.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items())
    save_adapter(bench.model, "org/base", None, tmp_path)
    merged = load_adapted(bench.spec, bench.recipe, tmp_path).merge_and_unload(safe_merge=True)
    if method is QLORA4:  # 8 bits are for activations too
        torch.testing.assert_close(logits(merged, bench), trained, rtol=1e-4, atol=1e-4)
    for key, layer in bench.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            found = merged.get_submodule(key).weight.T if name == "gpt2" else merged.get_submodule(key).weight
            expected = dequantize_module_weight(layer.base_layer) + layer.get_delta_weight("default")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_that_the_checkpoint_lacks_are_trained_whole(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["bert"], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for method in ("lora", QLORA4):
        bench = Bench("text-classification", tmp_path / "model", ROWS, method=method).ready()
        assert list(bench.model.peft_config["default"].modules_to_save) == ["bert.pooler.dense", "classifier"]
        assert bench.model.get_base_model().bert.pooler.dense.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2"])
def test_a_new_token_is_trained_and_merged(folders: dict[str, str], name: str, tmp_path: Path) -> None:
    rows = {"text": [f"<sep> {line}" for line in TEXTS], "label": ROWS["label"]}
    changes = {"add_special_tokens": ["<sep>", "<row>"]}
    bench = Bench("text-classification", folders[name], rows, method="lora", tokenizer=changes).ready()
    before = bench.model.get_base_model().get_input_embeddings().weight.clone()
    bench.learn(steps=8)
    trained = logits(bench.model, bench)
    save_adapter(bench.model, "org/base", None, tmp_path)
    merged = load_adapted(bench.spec, bench.recipe, tmp_path).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, bench), trained, rtol=1e-5, atol=1e-5)
    changed = (merged.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    used, unused = bench.recipe.processor.convert_tokens_to_ids(["<sep>", "<row>"])
    assert used in changed
    assert set(changed) <= {used, unused}  # weight decay moves this one


def test_new_tokens_are_trained_in_both_tables_of_embeddings(folders: dict[str, str]) -> None:
    bench = Bench(
        "text-classification", folders["llama"], ROWS, method="lora", tokenizer={"add_tokens": ["hm", "ah"]}
    )
    config = transformers.AutoConfig.from_pretrained(folders["llama"])
    size = config.vocab_size
    for tied, names in ((False, {"model.embed_tokens", "lm_head"}), (True, {"model.embed_tokens"})):
        config.tie_word_embeddings = tied
        model = transformers.AutoModelForCausalLM.from_config(config)
        found = adapters.added_tokens(model, bench.recipe)
        assert found == {name: [size, size + 1] for name in names}


def test_gradients_are_those_without_gradient_checkpointing(folders: dict[str, str]) -> None:
    model = {"name": folders["bert"], "overrides": STILL}
    bench = Bench("text-classification", "", ROWS, model=model, method={"name": "lora", "dropout": 0}).ready()
    bench.model.train()
    found = []
    for switch in (False, True):
        if switch:
            bench.model.gradient_checkpointing_enable()
        bench.loss(bench.batch()).backward()
        changing = {name: weight for name, weight in bench.model.named_parameters() if weight.requires_grad}
        found.append({name: weight.grad for name, weight in changing.items()})
        bench.model.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def faults(folder: str, **options: Any) -> list[str]:
    bench = Bench("text-classification", folder, ROWS, **options)
    return method_faults(bench.spec, bench.recipe)


def test_what_a_method_cannot_do_is_reported_before_work(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = folders["bert"]
    assert faults(bert, method="lora") == []
    (fault,) = faults(bert, method={"name": "lora", "targets": ["query", "q_proj"]})
    assert fault == (
        "method.targets: no linear layer below the head is named 'q_proj'; choose among: dense, key, query, value"
    )
    scratch = {"name": bert, "scratch": True}
    (fault,) = faults("", model=scratch, method="qlora")
    assert "method qlora freezes the base" in fault
    (fault,) = faults(bert, method="qlora", workers={"strategy": "fsdp"})
    assert "choose ddp" in fault
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    found = faults(bert, method="qlora", schedule={"optimizer": "adamw_8bit"})
    assert found == [
        "method qlora needs bitsandbytes: pip install bitsandbytes",
        "schedule.optimizer adamw_8bit needs bitsandbytes: pip install bitsandbytes",
    ]
    assert faults(bert) == []


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
T5_SIZES = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}
OTHERS: dict[str, tuple[str, dict[str, Any], set[str], set[str], set[str]]] = {
    "ViTForImageClassification": (
        "ViTConfig", SIZES, {"classifier"}, {"classifier"},
        {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config", {**SIZES, "num_conv_pos_embedding_groups": 2}, {"projector", "classifier"},
        {"projector", "classifier"},
        {"projection", "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"},
    ),
    "RobertaForSequenceClassification": (
        "RobertaConfig", SIZES, {"classifier.dense", "classifier.out_proj"},
        {"classifier.dense", "classifier.out_proj"}, {"query", "key", "value", "dense"},
    ),
    "LlamaForCausalLM": (
        "LlamaConfig", SIZES, {"lm_head"}, set(),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "T5ForConditionalGeneration": (
        "T5Config", T5_SIZES, set(), set(), {"q", "k", "v", "o", "wi", "wo"},
    ),
    "BertForMaskedLM": (
        "BertConfig", SIZES,
        {"cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"}, set(),
        {"query", "key", "value", "dense"},
    ),
}  # fmt: skip
"""Class to: config, sizes; modules with weights of the head, those trained whole beside adapters, adapted layers."""


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_head_and_what_gets_adapters(name: str) -> None:
    config, sizes, head, whole, linear = OTHERS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    assert {weight.rpartition(".")[0] for weight in head_weights(model, set())} == head
    assert set(trained_modules(model, set())) == whole
    layers = linear_layers(model, trained_modules(model, set()))
    assert {layer.rpartition(".")[2] for layer in layers} == linear
    assert not any(layer.startswith(("cls.", "classifier", "lm_head")) for layer in layers)


def test_layers_that_are_not_called_get_no_adapters() -> None:
    """WavLM passes the weights of its attention to a function of torch."""
    with torch.device("meta"):
        model = transformers.WavLMForSequenceClassification(transformers.WavLMConfig(num_hidden_layers=1))
    layers = linear_layers(model, trained_modules(model, set()))
    assert {layer.rpartition(".")[2] for layer in layers} == {
        "projection", "gru_rel_pos_linear", "intermediate_dense", "output_dense",
    }  # fmt: skip


def test_a_model_without_a_head_of_its_own_is_refused(folders: dict[str, str]) -> None:
    bench = Bench("text-classification", folders["gpt2"], ROWS, method="head")
    bench.recipe.auto_class = "AutoModelForCausalLM"
    (fault,) = method_faults(bench.spec, bench.recipe)
    assert "GPT2LMHeadModel has no separate head" in fault


def test_a_new_layer_tied_to_the_base_is_refused(folders: dict[str, str]) -> None:
    bench = Bench("text-classification", folders["bert"], ROWS, method="lora")
    bench.recipe.auto_class = "AutoModelForMaskedLM"  # of a checkpoint that has no such head
    with pytest.raises(SpecError, match=r"cls\.predictions\.bias cannot be trained .* choose method full"):
        method_faults(bench.spec, bench.recipe)


def train_here(bench: Bench, out: Path) -> dict[str, Any]:
    """The training loop in this process, on the bench's rows, without Ray. :returns: its last news."""
    rows = bench.features.append_column(ROW, pa.array(range(len(bench.features))))
    rows = rows.append_column(LENGTH, pa.array(bench.recipe.lengths(bench.features)))
    for part in ("train", "eval"):
        (out / "features" / part).mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, out / "features" / part / "part-0.parquet")
    spec = bench.spec.model_copy(update={"output": str(out)})
    order = TrainWorkerConfig(spec, pin(spec.model), bench.recipe.fitted, str(out / "features"))
    news: list[dict[str, Any]] = []
    local = out / "local"
    shutil.rmtree(local, ignore_errors=True)
    train(order, local, 0, 1, news.append)
    return news[-1]


@pytest.mark.parametrize("method", ["lora", QLORA4, QLORA8], ids=["lora", "4 bits", "8 bits"])
def test_a_resumed_training_gives_the_same_weights(
    folders: dict[str, str], method: Any, tmp_path: Path
) -> None:
    options = {
        "schedule": {"epochs": 2, "learning_rate": 5e-3},
        "batch": {"size": 2},
        "evaluation": {"keep": 5, "metric": "loss"},
        "compute": {"dtype": "float32"},
        "tokenizer": {"add_special_tokens": ["<sep>"]},
    }
    rows = {"text": [f"{line} <sep>" for line in TEXTS], "label": ROWS["label"]}
    bench = Bench("text-classification", folders["bert"], rows, method=method, **options).ready()
    whole = train_here(bench, tmp_path)
    best, *_ = sorted(
        (entry for entry in whole["log"] if "eval_loss" in entry), key=lambda entry: entry["eval_loss"]
    )
    assert best["step"] == whole["best_step"] > 0
    if method is not QLORA8:
        assert whole["merged"]["loss"] == pytest.approx(best["eval_loss"], rel=1e-4)
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    store = Checkpoints(str(tmp_path / "__hfbatch" / "checkpoints"))
    assert store.steps() == [3, 6]
    shutil.rmtree(store.path(6))
    for folder in ("model", "adapter"):
        shutil.rmtree(tmp_path / folder)
    assert train_here(bench, tmp_path)["resumed_at"] == 3
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight, err_msg=name)
