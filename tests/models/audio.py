"""Models that hear and speak."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.models.text import labels_of


def tiny_wav2vec2(
    folder: str | Path,
    architecture: str,
    id2label: Mapping[int, str] | None = None,
    seed: int = 0,
    masks: bool = False,
    **options: Any,
) -> str:
    """A Wav2Vec2 of 16 kHz, or one of its family; for CTC with a tokenizer of characters.

    :param masks: whether it is of the kind that attention masks are for, as the large ones are.
    :param options: more of the config.
    :returns: its folder.
    """
    folder = Path(folder)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *string.ascii_uppercase]
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": len(letters), "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "pad_token_id": 0, "classifier_proj_size": 32,
        "initializer_range": 0.3, "feat_extract_norm": "layer" if masks else "group",
        "do_stable_layer_norm": masks, **(labels_of(id2label) if id2label else {}),
    }  # fmt: skip
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**{**small, **options}))
    model.eval().save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masks).save_pretrained(folder)
    if architecture.endswith("CTC"):
        (folder / "vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return str(folder)


def whisper_tokenizer(seconds: int = 2) -> transformers.WhisperTokenizer:
    """Letters and a space, Whisper's special tokens, and a token for every 0.02 seconds."""
    vocabulary = {letter: k for k, letter in enumerate(["Ġ", *string.ascii_lowercase])}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[])
    names = ("startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(50 * seconds + 1)])
    return tokenizer


def tiny_whisper(
    folder: str | Path, seconds: int = 2, seed: int = 0, english_only: bool = False, **options: Any
) -> str:
    """A Whisper that hears so many seconds at a time, of two languages or of English alone.

    :param options: more of the config.
    :returns: its folder.
    """
    tokenizer = whisper_tokenizer(seconds)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in (
        "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps", "endoftext"
    )}  # fmt: skip
    end, start = ids["endoftext"], ids["startoftranscript"]
    small: dict[str, Any] = {
        "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "num_mel_bins": 80, "max_source_positions": 50 * seconds, "max_target_positions": 64, "init_std": 0.7,
        "pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    config = transformers.WhisperConfig(**{**small, **options})
    torch.manual_seed(seed)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that it seldom writes a timestamp unasked
        model.model.decoder.embed_tokens.weight[ids["notimestamps"] :] *= 0.3
    languages = {} if english_only else {
        "lang_to_id": {f"<|{name}|>": ids[name] for name in ("en", "de")},
        "task_to_id": {name: ids[name] for name in ("translate", "transcribe")},
    }  # fmt: skip
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, bos_token_id=end, max_length=20,
        is_multilingual=not english_only, no_timestamps_token_id=ids["notimestamps"],
        prev_sot_token_id=ids["startofprev"], alignment_heads=[[0, 1], [1, 2]], return_timestamps=False,
        **languages,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=seconds).save_pretrained(folder)
    return str(folder)


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each letter, joined without spaces."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    letters = {letter: k for k, letter in enumerate([*special.values(), *string.ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_moonshine(folder: str | Path, seed: int = 0) -> str:
    """An encoder-decoder over samples. :returns: its folder."""
    tokenizer = letter_tokenizer()
    config = transformers.MoonshineConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4,
        initializer_range=0.5, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.MoonshineForConditionalGeneration(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(
        folder
    )
    return str(folder)


def tiny_parakeet(folder: str | Path, seed: int = 0) -> str:
    """A transducer of tokens and durations. :returns: its folder."""
    tokenizer = letter_tokenizer()
    blank = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<blank>"]})
    config = transformers.ParakeetTDTConfig(
        vocab_size=blank + 1, decoder_hidden_size=32, num_decoder_layers=1, pad_token_id=0, blank_token_id=blank,
        initializer_range=0.5,
        encoder_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
            "subsampling_conv_channels": 8, "initializer_range": 0.5,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.ParakeetForTDT(config).eval()
    model.generation_config.decoder_start_token_id = blank
    model.generation_config.suppress_tokens = [blank + 1 + k for k in range(len(config.durations))]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ParakeetFeatureExtractor().save_pretrained(folder)
    return str(folder)
