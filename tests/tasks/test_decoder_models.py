"""Padding on the left changes no row, however a model knows where its tokens are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
)

from hfbatch.tasks.text_generation import TextGeneration
from tests.models.text import CORPUS, bytes_tokenizer, save
from tests.tasks.drive import make, run

TEXTS = [CORPUS[k][: 3 + 2 * k] for k in range(24)]
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
        assert len(set(expected)) > 10
        task = make(TextGeneration, folder, max_new_tokens=12, return_full_text=False, **options)
        assert task.check() == []
        for size in (1, 8):
            assert run(task, {"text": TEXTS}, size)["generated_text"].to_pylist() == expected
