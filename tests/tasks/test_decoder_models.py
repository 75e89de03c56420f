"""Padding on the left changes no row, however a model knows where its tokens are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from hfbatch.engines.base import EngineConfig
from hfbatch.engines.torch import TorchEngine
from hfbatch.runtime.predictor import Predictor
from hfbatch.tasks.generation.text_generation import TextGeneration
from tests.models.text import CORPUS, bytes_tokenizer, save
from tests.tasks.drive import features_of, make, run

TEXTS = [CORPUS[k][: 3 + 4 * k] for k in range(12)]
TOKENS = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
CONFIGS: dict[str, PretrainedConfig] = {
    "sliding window": MistralConfig(**WIDE, sliding_window=8),
    "sliding and full": Gemma2Config(**WIDE, head_dim=8, sliding_window=8),
    "learned positions": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "linear biases": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "recurrent state": MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, initializer_range=0.2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_gets_what_it_gets_alone(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(CONFIGS[name]), bytes_tokenizer(128))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        expected = []
        for text in TEXTS:
            inputs = tokenizer(text, return_tensors="pt")
            made = model.eval().generate(**inputs, max_new_tokens=12, **options)
            new = made[0, inputs["input_ids"].shape[1] :]
            expected.append(tokenizer.decode(new, skip_special_tokens=True))
        assert len(set(expected)) > 8
        task = make(TextGeneration, folder, max_new_tokens=12, return_full_text=False, **options)
        assert task.check() == []
        assert run(task, {"text": TEXTS})["generated_text"].to_pylist() == expected


SEEING: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "positions that count padding": (
        BartForCausalLM,
        BartConfig(
            **TOKENS, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, init_std=0.3,
            is_decoder=True, is_encoder_decoder=False, max_position_embeddings=128,
        ),
    ),
    "a state that padding goes through": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig(
            **TOKENS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, lru_width=32, intermediate_size=64,
            attention_window_size=64, head_dim=8,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_models_that_see_padding_get_none(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls, config = SEEING[name]
    model = cls(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    folder = save(tmp_path, model, bytes_tokenizer(128))
    task = make(TextGeneration, folder, max_new_tokens=6, return_full_text=False, do_sample=False)
    assert task.check() == []
    features = features_of(task, {"text": TEXTS}).table
    engine = TorchEngine(EngineConfig(folder, task.auto_class, "float32"))
    together = Predictor(task, engine, 8).predict(features)
    assert together.failures == []
    assert together.batches == len({len(row) for row in features["input_ids"].to_pylist()})
    alone = Predictor(task, engine, 1).predict(features)
    found = [
        task.postprocess(one.outputs, {"text": pa.array(TEXTS)})[0].to_pylist() for one in (together, alone)
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) > 8
