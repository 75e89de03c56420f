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

from tests.models.text import labels_of, wordpiece_tokenizer


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


def tiny_vits(folder: str | Path, speakers: int = 1, seed: int = 0) -> str:
    """A VITS that speaks letters at 16 kHz. :returns: its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<unk>", " ", ".", *string.ascii_lowercase]
    (folder / "vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(letters)}))
    tokenizer = transformers.VitsTokenizer(str(folder / "vocab.json"), phonemize=False)
    tokenizer.save_pretrained(folder)
    config = transformers.VitsConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
        flow_size=16, spectrogram_bins=9, upsample_initial_channel=16, upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        depth_separable_num_layers=1, duration_predictor_filter_channels=16, duration_predictor_num_flows=1,
        prior_encoder_num_flows=1, prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
        initializer_range=0.3, num_speakers=speakers, speaker_embedding_size=8 if speakers > 1 else 0,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.VitsModel(config).eval().save_pretrained(folder)
    return str(folder)


def tiny_speecht5(folder: str | Path, seed: int = 0) -> tuple[str, str]:
    """A SpeechT5 for voices of 8 numbers, and a vocoder at 16 kHz. :returns: their folders."""
    folder = Path(folder)
    tokenizer = letter_tokenizer()
    config = transformers.SpeechT5Config(
        vocab_size=len(tokenizer), hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, num_mel_bins=8,
        speech_decoder_prenet_units=16, speaker_embedding_dim=8, speech_decoder_postnet_layers=2,
        speech_decoder_postnet_units=16, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.SpeechT5ForTextToSpeech(config).eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=16, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], initializer_range=0.3,
    )  # fmt: skip
    transformers.SpeechT5HifiGan(vocoder).eval().save_pretrained(folder / "vocoder")
    return str(folder / "model"), str(folder / "vocoder")


def tiny_musicgen(folder: str | Path, seed: int = 0) -> str:
    """A MusicGen of two codebooks at 16 kHz. :returns: its folder."""
    tokenizer = letter_tokenizer()
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
        ).to_dict(),
        audio_encoder=transformers.EncodecConfig(
            target_bandwidths=[8.0], sampling_rate=16_000, hidden_size=8, num_filters=4, upsampling_ratios=[4, 4],
            codebook_size=16, codebook_dim=8, num_lstm_layers=1, kernel_size=3, last_kernel_size=3,
        ).to_dict(),
        decoder=transformers.MusicgenDecoderConfig(
            vocab_size=16, max_position_embeddings=64, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
            hidden_size=16, num_codebooks=2, pad_token_id=16, bos_token_id=16, initializer_factor=0.5,
        ).to_dict(),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    for layer in model.audio_encoder.quantizer.layers:
        layer.codebook.embed.normal_()
    model.generation_config.update(
        decoder_start_token_id=16,
        pad_token_id=16,
        bos_token_id=16,
        do_sample=True,
        guidance_scale=2.0,
        max_length=24,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_clap(folder: str | Path, fusion: bool = False, seed: int = 0) -> str:
    """A CLAP of 16 kHz that hears a second.

    :param fusion: whether it takes longer recordings whole and in parts, not a part alone.
    :returns: its folder.
    """
    tokenizer = wordpiece_tokenizer(model_input_names=["input_ids", "attention_mask"])
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "projection_dim": 8, "pad_token_id": 0, "initializer_factor": 20.0,
        },
        audio_config={
            "spec_size": 64, "num_mel_bins": 64, "patch_embeds_hidden_size": 8, "hidden_size": 16, "window_size": 4,
            "depths": [1, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2, "projection_dim": 8,
            "enable_fusion": fusion, "initializer_factor": 20.0,
        },
        projection_dim=8, initializer_factor=20.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.ClapModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ClapFeatureExtractor(
        feature_size=64, sampling_rate=16_000, hop_length=320, max_length_s=1, fft_window_size=512,
        frequency_max=8_000, truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def tiny_spectrogram_transformer(folder: str | Path, id2label: Mapping[int, str], seed: int = 0) -> str:
    """An AST of 16 kHz that hears half a second. :returns: its folder."""
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=48,
        num_mel_bins=32, initializer_range=0.5, **labels_of(id2label),
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.ASTForAudioClassification(config).eval().save_pretrained(folder)
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=48).save_pretrained(folder)
    return str(folder)
