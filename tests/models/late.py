"""Models for late interaction: the files of PyLate, and the original ColBERT checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from tests.models.text import save, wordpiece_tokenizer

SIZE, WIDTH = 32, 16


def tiny_pylate(folder: str | Path, markers: tuple[str, ...] = ("[D] ", "[Q] "), **settings: Any) -> str:
    """A BERT with two projections, as PyLate saves it. :param markers: tokens of the tokenizer. :returns: its folder."""
    _encoder(folder, markers)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    config = {
        "model_type": "ColBERT", "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20, "document_length": 30,
        "attend_to_expansion_tokens": False, "skiplist_words": [".", ","], "do_query_expansion": True,
    }  # fmt: skip
    config = {name: value for name, value in (config | settings).items() if value != "left out"}
    _write(folder, "modules.json", modules)
    _write(folder, "config_sentence_transformers.json", config)
    _write(folder, "sentence_bert_config.json", {"max_seq_length": 29, "do_lower_case": False})
    for at, (inner, outer) in enumerate(((SIZE, 24), (24, WIDTH)), start=1):
        dense = {
            "in_features": inner, "out_features": outer, "bias": False, "use_residual": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        _write(folder, f"{at}_Dense/config.json", dense)
        weights = {"linear.weight": torch.randn(outer, inner)}
        save_file(weights, Path(folder) / f"{at}_Dense" / "model.safetensors")
    return str(folder)


def tiny_colbert(folder: str | Path, **metadata: Any) -> str:
    """An original ColBERT checkpoint: a projection among the weights of a BERT. :returns: its folder."""
    _encoder(folder, ("[unused0]", "[unused1]"))
    path = Path(folder) / "model.safetensors"
    weights = {f"bert.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**weights, "linear.weight": torch.randn(WIDTH, SIZE)}, path, {"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text())
    _write(folder, "config.json", {**config, "architectures": ["HF_ColBERT"]})
    settings = {
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_maxlen": 20,
        "doc_maxlen": 30,
    }
    _write(folder, "artifact.metadata", {**settings, "dim": WIDTH, "mask_punctuation": True, **metadata})
    return str(folder)


def _encoder(folder: str | Path, tokens: tuple[str, ...]) -> None:
    tokenizer = wordpiece_tokenizer(64)
    tokenizer.add_tokens(list(tokens))
    torch.manual_seed(0)
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, pad_token_id=0
    )
    save(folder, BertModel(config), tokenizer)


def _write(folder: str | Path, name: str, content: Any) -> None:
    path = Path(folder) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
