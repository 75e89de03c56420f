"""Models in lowered precision: which layers are quantised, how near they stay, threads, and what the plan refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hfbatch.cli.app import app
from hfbatch.engines import ENGINES
from hfbatch.engines.base import EngineConfig
from hfbatch.engines.quantization import linear_layers
from hfbatch.engines.quantization import save as save_quantised
from hfbatch.engines.torch import TorchEngine, load_model
from hfbatch.errors import SpecError
from hfbatch.hub.models import pin
from hfbatch.runtime.checks import engine_faults
from hfbatch.runtime.config import RunnerConfig, RuntimeChoice
from hfbatch.runtime.runner import Runner
from hfbatch.spec.job import JobSpec
from tests.models.quantised import KINDS, quantised_checkpoint
from tests.models.text import CORPUS, bytes_tokenizer, save, tiny_bert, tiny_llama, tiny_t5
from tests.models.vision import tiny_vision

SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
NEAREST = {"int8": 0.999, "nf4": 0.95, "fp4": 0.9, "int8_weight_only": 0.9995, "int8_dynamic": 0.999}
"""Lowest cosine of a row to float32, with the tiny models of this file."""
CHECKPOINTS = {"int8": 0.998, "nf4": 0.95, "torchao": 0.998, "W8A8": 0.999, "W4A16": 0.95, "fp8": 0.995}
"""The same for checkpoints that are quantised."""
IDS = torch.arange(5, 45).reshape(4, 10)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"), **SIZES)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"), **SIZES)


def config_of(folder: str, quantization: str, kind: str = "SequenceClassification", **more: Any) -> Any:
    dtype = more.pop("dtype", "float32")
    return EngineConfig(folder, f"AutoModelFor{kind}", dtype, quantization=quantization, **more)


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def lowest_cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return torch.cosine_similarity(found.flatten(0, -2), expected.flatten(0, -2), dim=-1).min().item()


def quantised(model: torch.nn.Module) -> set[str]:
    """Names of the layers whose weights are not plain floating-point tensors."""
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and not (type(layer.weight) is torch.nn.Parameter and layer.weight.dtype.is_floating_point)
    }


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """What the first call of a layer of bitsandbytes may change: where its weights are, and their scale."""
    return {
        name: (value.data_ptr(), getattr(value, "CB", None) is None)
        for name, value in model.named_parameters()
    }


def test_every_quantization_of_the_engines_is_tested_here() -> None:
    for name in ("torch", "continuous"):
        assert set(ENGINES[name].quantizations) == set(NEAREST)
    assert set(KINDS) == set(CHECKPOINTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", NEAREST)
def test_the_base_model_is_quantised_and_stays_near(
    bert: str, llama: str, quantization: str, dtype: str
) -> None:
    for folder, kind, head in (
        (bert, "SequenceClassification", "classifier"),
        (llama, "CausalLM", "lm_head"),
    ):
        plain = load_model(config_of(folder, "none", kind), torch.float32)
        engine = TorchEngine(config_of(folder, quantization, kind, dtype=dtype, threads=2))
        linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
        assert head in linear
        assert quantised(engine.model) == linear - {head}
        assert engine.model.get_submodule(head).weight.dtype == getattr(torch, dtype)
        assert engine.dtype == dtype
        state = state_of(engine.model)
        made = logits_of(engine.model)
        assert state_of(engine.model) == state  # threads may share the first call, too
        assert lowest_cosine(made, logits_of(plain)) > NEAREST[quantization] - 0.001
        assert not torch.equal(made, logits_of(plain).to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", NEAREST)
def test_threads_give_the_same_bits(bert: str, quantization: str, dtype: str) -> None:
    columns = {"text": pa.array([CORPUS[k % len(CORPUS)][: 3 + k] for k in range(40)])}
    spec = spec_of(bert, quantization, dtype=dtype)
    found = []
    for threads in (1, 4):
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)))
        runner._threads = threads
        runner.apply(RuntimeChoice(2, dtype, "cpu"))
        assert runner.engine.parallel == threads
        made = runner.run(columns)
        assert len(made.positions) == 40
        found.append({name: column.to_pylist() for name, column in made.columns.items()})
    assert found[0] == found[1]


def spec_of(folder: str, quantization: str, task: str = "text-classification", **more: Any) -> JobSpec:
    engine = {"name": more.pop("engine", "torch"), "quantization": quantization}
    values = {"task": task, "input": "in", "output": "out", "engine": engine}
    params = more.pop("params", {})
    return JobSpec.build({**values, "model": {"name": folder, **more}, "params": params})


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, whose layers are no `torch.nn.Linear`."""
    tokenizer = bytes_tokenizer(128)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2))
    return save(tmp_path_factory.mktemp("gpt2"), model, tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_layers_of_any_size_are_quantised_in_4_bits(
    gpt2: str, tmp_path: Path, quantization: str, dtype: str
) -> None:
    """The fused product of bitsandbytes fails with widths of 32, which are no multiple of its block of 64."""
    plain = load_model(config_of(gpt2, "none", "CausalLM"), torch.float32)
    model = load_model(config_of(gpt2, quantization, "CausalLM"), getattr(torch, dtype))
    assert sorted(quantised(model)) == [
        f"transformer.h.{layer}.{name}"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert lowest_cosine(logits_of(model), logits_of(plain)) > 0.9
    t5 = load_model(config_of(tiny_t5(tmp_path), quantization, "Seq2SeqLM"), getattr(torch, dtype))
    assert "lm_head" not in quantised(t5)
    with torch.inference_mode():
        assert t5(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()


def wavlm() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Passes the weights of its attention to a function of torch."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    convolutions = {
        "conv_dim": (32,),
        "conv_stride": (20,),
        "conv_kernel": (20,),
        "num_feat_extract_layers": 1,
    }
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = transformers.WavLMConfig(**sizes, **convolutions, **positions, vocab_size=32)
    return transformers.WavLMModel(config), {"input_values": torch.randn(2, 800)}


def longt5() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Casts activations to the type of a weight."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    model = transformers.LongT5ForConditionalGeneration(
        transformers.LongT5Config(**sizes, decoder_start_token_id=0)
    )
    return model, {"input_ids": IDS, "decoder_input_ids": IDS}


def mamba() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Multiplies with a weight itself."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 8}
    return transformers.MambaModel(transformers.MambaConfig(**sizes)), {"input_ids": IDS}


def segformer() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Has no input embeddings."""
    sizes = {"hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32, "num_attention_heads": [1, 1, 2, 2]}
    model = transformers.SegformerModel(transformers.SegformerConfig(**sizes, depths=[1, 1, 1, 1]))
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def swin() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Gives linear layers tensors of four dimensions."""
    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32}
    model = transformers.Swin2SRModel(transformers.Swin2SRConfig(**sizes, mlp_ratio=2.0))
    return model, {"pixel_values": torch.rand(1, 3, 16, 16)}


@pytest.mark.parametrize("quantization", NEAREST)
@pytest.mark.parametrize("build", [wavlm, longt5, mamba, segformer, swin])
def test_unusual_models_are_quantised_where_their_code_calls_the_layers(
    build: Callable[[], tuple[Any, dict[str, torch.Tensor]]], quantization: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain, inputs = build()
    plain.eval().save_pretrained(tmp_path)
    name = "AutoModelForSeq2SeqLM" if build is longt5 else "AutoModel"
    engine = TorchEngine(EngineConfig(str(tmp_path), name, "float32", quantization=quantization))
    assert quantised(engine.model) == set(linear_layers(plain, quantization))
    with torch.inference_mode():
        wanted, found = (model(**inputs)[0].float() for model in (plain, engine.model))
    assert lowest_cosine(found, wanted) > (0.9 if quantization in ("nf4", "fp4") else 0.995)


@pytest.mark.parametrize("quantization", NEAREST)
def test_a_model_with_weights_beside_its_layers_is_read_as_it_was_written(
    quantization: str, tmp_path: Path
) -> None:
    """CLIP has a weight `logit_scale` of its own, the name of which torchao does not read."""
    folder = tiny_vision(tmp_path / "plain", "CLIPModel")
    model = load_model(EngineConfig(folder, "AutoModel", "float32", quantization=quantization), torch.float32)
    save_quantised(model, tmp_path / "written")
    again = load_model(EngineConfig(str(tmp_path / "written"), "AutoModel", "float32"), torch.float32)
    assert quantised(again) == quantised(model)
    inputs = {"input_ids": IDS, "pixel_values": torch.rand(2, 3, 32, 32)}
    with torch.inference_mode():
        assert torch.equal(*(one(**inputs).logits_per_image for one in (model, again)))


@pytest.mark.parametrize("quantization", NEAREST)
def test_added_tokens_get_the_embeddings_that_they_have_without_quantisation(
    llama: str, quantization: str
) -> None:
    size = 400
    plain = load_model(config_of(llama, "none", "CausalLM", vocabulary=size, seed=3), torch.float32)
    assert plain.get_input_embeddings().weight.shape[0] == size
    model = load_model(config_of(llama, quantization, "CausalLM", vocabulary=size, seed=3), torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert torch.equal(model.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    ids = torch.tensor([[5, 398, 399, 17]])
    assert lowest_cosine(logits_of(model, ids), logits_of(plain, ids)) > NEAREST[quantization] - 0.001


@pytest.mark.parametrize("quantization", NEAREST)
def test_continuous_batching_generates_what_batches_do(llama: str, quantization: str) -> None:
    found = []
    for engine in ("torch", "continuous"):
        params = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
        spec = spec_of(llama, quantization, "text-generation", engine=engine, dtype="float32", params=params)
        runner = Runner(RunnerConfig.of(spec, pin(spec.model)), share=0.01)
        runner.apply(RuntimeChoice(1, "float32", "cpu"))
        made = runner.run({"text": pa.array(CORPUS[:4])})
        found.append({name: column.to_pylist() for name, column in made.columns.items()})
    assert found[0] == found[1]


def faults_of(spec: JobSpec) -> list[str]:
    task = RunnerConfig.of(spec, pin(spec.model)).build_task()
    return engine_faults(spec.engine, spec.model.dtype, task)


def test_a_model_without_layers_to_quantise_is_refused(gpt2: str, llama: str) -> None:
    for engine in ("torch", "continuous"):
        params = {"do_sample": False}
        spec = spec_of(gpt2, "int8_weight_only", "text-generation", engine=engine, params=params)
        (fault,) = faults_of(spec)
        assert f"engine.quantization int8_weight_only of engine {engine} quantises linear layers" in fault
        assert fault.endswith("set engine.quantization to int8, nf4, fp4")
        assert faults_of(spec_of(gpt2, "int8", "text-generation", engine=engine, params=params)) == []
        assert (
            faults_of(spec_of(llama, "int8_dynamic", "text-generation", engine=engine, params=params)) == []
        )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "nearest"), CHECKPOINTS.items())
def test_a_quantised_checkpoint_is_computed_in_the_dtype_of_the_job(
    llama: str, tmp_path: Path, kind: str, nearest: float, stored: torch.dtype
) -> None:
    """Whatever the dtype of its other weights, which transformers would keep."""
    plain = load_model(config_of(llama, "none", "CausalLM"), torch.float32)
    folder = quantised_checkpoint(kind, llama, tmp_path / "model", stored)
    assert faults_of(spec_of(folder, "none", "text-generation")) == []
    for dtype in ("float32", "bfloat16"):
        engine = TorchEngine(config_of(folder, "none", "CausalLM", dtype=dtype, threads=4))
        assert engine.dtype == dtype
        assert engine.parallel == 4
        rows = [IDS[row : row + 1] for row in (0, 1, 2, 3)]
        with ThreadPoolExecutor(4) as pool:
            shared = list(pool.map(partial(logits_of, engine.model), rows * 4))
        alone = [logits_of(engine.model, row) for row in rows] * 4
        assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))
        plain_ones = [one for one in engine.model.parameters() if type(one) is torch.nn.Parameter]
        assert {weight.dtype for weight in plain_ones} == {getattr(torch, dtype)}
        with torch.inference_mode():
            found = engine.model(input_ids=IDS).logits
        assert found.dtype == getattr(torch, dtype)
        assert lowest_cosine(found.float(), logits_of(plain)) > nearest
        assert lowest_cosine(found.float(), logits_of(plain)) < 0.999999


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_names_the_library_that_it_needs(llama: str, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(
        SpecError, match=rf"quantised by {method}, which needs gptqmodel.*pip install gptqmodel"
    ):
        pin(spec_of(str(folder), "none").model)


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"load_in_8bit": True, "llm_int8_threshold": "x"}, "llm_int8_threshold must be a float"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "foo"}, "no attribute 'foo'"),
        (
            {"quant_method": "compressed-tensors", "config_groups": 3},
            "config_groups Input should be a valid dict",
        ),
    ],
)
def test_settings_that_transformers_does_not_read_are_faults(
    llama: str, tmp_path: Path, given: dict[str, Any], cause: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": given}))
    (fault,) = faults_of(spec_of(str(folder), "none", "text-generation"))
    assert "quantization_config that transformers does not read" in fault
    assert cause in fault


def test_weights_that_are_quantised_already_are_not_quantised_again(llama: str, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    (fault,) = faults_of(spec_of(str(tmp_path), "nf4", "text-generation"))
    assert fault == (
        f"engine.quantization nf4: the weights of model {str(tmp_path)!r} are quantised already, by bitsandbytes; leave "
        "engine.quantization out"
    )
    assert faults_of(spec_of(str(tmp_path), "none", "text-generation")) == []


def test_a_library_that_is_missing_is_named(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfbatch.engines.find_spec", lambda name: None)
    (fault,) = faults_of(spec_of(llama, "int8_dynamic", "text-generation"))
    assert "int8_dynamic of engine torch needs torchao; pip install 'hfbatch[quantization]'" in fault
    shown = CliRunner().invoke(app, ["engines"], env={"COLUMNS": "200"}).stdout
    assert "engine.quantization of continuous: int8 (needs bitsandbytes), nf4 (needs bitsandbytes)" in shown
    assert "pip install 'hfbatch[quantization]' installs what quantisation needs." in shown
    monkeypatch.undo()
    assert (
        "torch: int8, nf4, fp4, int8_weight_only, int8_dynamic\n"
        in CliRunner().invoke(app, ["engines"], env={"COLUMNS": "200"}).stdout
    )
