"""Models that hear."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from tests.models.text import labels_of


def tiny_wav2vec2(
    folder: str | Path, architecture: str, id2label: Mapping[int, str] | None = None, seed: int = 0
) -> str:
    """A Wav2Vec2 of 16 kHz; for CTC with a tokenizer of characters. :returns: its folder."""
    folder = Path(folder)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase]
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=len(letters),
        conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, pad_token_id=0,
        classifier_proj_size=32, initializer_range=0.3, **(labels_of(id2label) if id2label else {}),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    model.eval().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    if architecture.endswith("CTC"):
        (folder / "vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return str(folder)
