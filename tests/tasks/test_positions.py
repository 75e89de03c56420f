"""The length limit of models whose first position stands behind the padding index, told by the models themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hfbatch.tasks.multimodal.embedding import Embedding
from hfbatch.tasks.positions import BEHIND_PADDING, position_limit
from hfbatch.tasks.text.token_classification import TokenClassification
from hfbatch.tasks.tokens import length_limit
from tests.models.text import save, wordpiece_tokenizer
from tests.tasks.drive import features_of, make, run

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OF_PARTS = {"altclip_text_model", "bridgetower_text_model", "clap_text_model"}
"""Types of the text side of larger models, which AutoModel does not load alone."""
OTHERS = {
    "bart": {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 32},
    "bert": SIZES, "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "opt": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 32},
}  # fmt: skip
"""Types that number positions otherwise, or whose table has room for it."""
SPECIAL = {
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 4, "shape_size": 8},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "longformer": {"attention_window": 8},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 32},
    "xmod": {"default_language": "en_XX"},
}
LONG = " ".join(["river"] * 100)


def tiny_config(kind: str) -> Any:
    settings: dict[str, Any] = {**OTHERS.get(kind, SIZES)}
    settings |= {"max_position_embeddings": 40, "vocab_size": 50, "pad_token_id": 3}
    return AutoConfig.for_model(kind, **(settings | SPECIAL.get(kind, {})))


@pytest.mark.parametrize("kind", sorted(BEHIND_PADDING - OF_PARTS | set(OTHERS)))
def test_the_limit_is_the_most_tokens_that_a_model_reads(kind: str) -> None:
    config = tiny_config(kind)
    model, limit = AutoModel.from_config(config).eval(), position_limit(config)
    assert limit is not None
    with torch.inference_mode():
        model(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_every_model_that_counts_from_behind_the_padding_is_known() -> None:
    """By transformers' own source: positions from ids, in a table of as many rows as the config says."""
    table = re.compile(r"Embedding\(\s*config\.max_position_embeddings,\s*config\.hidden_size,\s*padding_idx")
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text(encoding="utf8")
        if "position_ids_from_input_ids" in source and table.search(source):
            found.add(file.parent.name)
    known = {
        kind.replace("-text", "").replace("_text_model", "").replace("-", "_") for kind in BEHIND_PADDING
    }
    proteins_and_layouts = {"evolla", "pp_doclayout_v2"}
    assert found - known - proteins_and_layouts == set()


def tiny_roberta(folder: Path, head: str = "Model", stated: int | None = None) -> str:
    """A RoBERTa of 40 positions, and a tokenizer that states no limit unless one is given."""
    tokenizer = wordpiece_tokenizer(stated or int(1e30))
    config = transformers.RobertaConfig(
        **SIZES, max_position_embeddings=40, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        type_vocab_size=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(folder, getattr(transformers, f"Roberta{head}")(config), tokenizer)


@pytest.mark.parametrize("stated", ["nothing", "tokenizer", "sentence-transformers"])
def test_long_texts_are_cut_at_the_last_position(tmp_path: Path, stated: str) -> None:
    folder = tiny_roberta(tmp_path, stated=40 if stated == "tokenizer" else None)
    if stated == "sentence-transformers":
        (tmp_path / "modules.json").write_text(
            '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
            '{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
        )
        (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(
            '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
        )
    task = make(Embedding, folder)
    assert task.limit == 39
    texts = [LONG, "A quiet river.", f"{LONG} mountain"]
    assert features_of(task, {"text": texts}).cut.tolist() == [True, False, True]
    found = np.array(run(task, {"text": texts}, size=3)["embedding"].to_pylist())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(texts, found, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=39, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).last_hidden_state[0].mean(0).numpy()
        assert np.abs(vector - expected).max() < 1e-4


def test_windows_of_a_long_text_fit_the_positions(tmp_path: Path) -> None:
    folder = tiny_roberta(tmp_path, "ForTokenClassification")
    task = make(TokenClassification, folder, aggregation_strategy="simple", stride=4, ignore_labels=[])
    (entities,) = run(task, {"text": [LONG]}, size=8)["entities"].to_pylist()
    assert entities[-1]["end"] == len(LONG)
    assert length_limit(task.tokenizer, task.config) == 39
