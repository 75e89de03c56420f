"""Models that see and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AddedToken

from tests.models.text import bytes_tokenizer, labels_of, wordpiece_tokenizer

SQUARE = {"height": 32, "width": 32}
ENDS = [3, *range(40, 70)]
"""Tokens that end a text of models that end one every few tokens."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_vilt(folder: str | Path, id2label: Mapping[int, str], seed: int = 0, **config: Any) -> str:
    """A ViLT that chooses among answers. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(40)
    pixels = transformers.ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    settings = {
        **SIZES,
        "image_size": 32,
        "patch_size": 8,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    names = labels_of(id2label)
    torch.manual_seed(seed)
    model = transformers.ViltForQuestionAnswering(
        transformers.ViltConfig(vocab_size=len(tokenizer), **names, **{**settings, **config})
    )
    return save_with(folder, model, transformers.ViltProcessor(pixels, tokenizer))


def tiny_blip(folder: str | Path, head: str, seed: int = 0) -> str:
    """A BLIP that writes: `QuestionAnswering` or `ConditionalGeneration`. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64)
    text = {
        **SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "encoder_hidden_size": 32,
        "projection_dim": 32, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
        "initializer_range": 0.5,
    }  # fmt: skip
    vision = {**SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 32, "initializer_range": 0.5}
    torch.manual_seed(seed)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = getattr(transformers, f"BlipFor{head}")(config)
    pixels = transformers.BlipImageProcessorPil(size=SQUARE)
    return save_with(folder, model, transformers.BlipProcessor(pixels, tokenizer))


def save_with(folder: str | Path, model: transformers.PreTrainedModel, processor: Any) -> str:
    """Writes model and processor into folder. :returns: the folder."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def tiny_layoutlm(folder: str | Path, seed: int = 0, **config: Any) -> str:
    """A LayoutLM that finds answers among words with boxes. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64)
    torch.manual_seed(seed)
    settings = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model = transformers.LayoutLMForQuestionAnswering(transformers.LayoutLMConfig(**settings, **config))
    return save_with(folder, model, tokenizer)


def tiny_donut(folder: str | Path, seed: int = 0) -> str:
    """A Donut: a Swin that sees and a BART that writes marked answers. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64, eos_token="[SEP]")
    marks = ["<s_docvqa>", "<s_question>", "</s_question>", "<s_answer>", "</s_answer>"]
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in marks])
    swin = transformers.DonutSwinConfig(
        image_size=[32, 32], patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    bart = transformers.MBartConfig(
        vocab_size=len(tokenizer), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=64, add_cross_attention=True, is_decoder=True, init_std=0.7, pad_token_id=0,
        eos_token_id=3, bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(swin, bart)
    model = transformers.VisionEncoderDecoderModel(config)
    for part in (model.config, model.generation_config):
        part.pad_token_id, part.eos_token_id, part.decoder_start_token_id = 0, 3, 2
    model.generation_config.forced_eos_token_id = (
        len(tokenizer) - 1
    )  # every answer ends, at last with its mark
    pixels = transformers.DonutImageProcessorPil(size=SQUARE)
    return save_with(folder, model, transformers.DonutProcessor(pixels, tokenizer))


def tiny_tapas(folder: str | Path, aggregations: Mapping[int, str] | None = None, seed: int = 0) -> str:
    """A TAPAS that chooses cells of a table and how to put them together. :returns: its folder."""
    vocabulary = sorted(wordpiece_tokenizer().get_vocab().items(), key=lambda one: one[1])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*(piece for piece, _ in vocabulary), "[EMPTY]"]))
    tokenizer = transformers.TapasTokenizer(
        str(folder / "vocab.txt"), cell_trim_length=-1, model_max_length=96, drop_rows_to_fit=True
    )
    config = transformers.TapasConfig(
        **SIZES, vocab_size=len(tokenizer), max_position_embeddings=96, type_vocab_sizes=[3, 64, 64, 2, 64, 64, 10],
        num_aggregation_labels=len(aggregations or {}), aggregation_labels=aggregations, initializer_range=0.3,
        no_aggregation_label_index=0 if aggregations else None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.TapasForQuestionAnswering(config)
    with torch.no_grad():
        model.output_bias.add_(1.5)  # so that most tables have cells to choose
    return save_with(folder, model, tokenizer)


def tiny_git(folder: str | Path, seed: int = 0) -> str:
    """A GIT that continues a caption. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64, model_input_names=["input_ids", "attention_mask"])
    vision = {**SIZES, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
    config = transformers.GitConfig(
        vision_config=vision, **SIZES, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    pixels = transformers.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return save_with(
        folder, transformers.GitForCausalLM(config), transformers.GitProcessor(pixels, tokenizer)
    )


def tiny_trocr(folder: str | Path, seed: int = 0) -> str:
    """A ViT that sees and a TrOCR that writes; tokenizer and image processor apart. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64)
    vit = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3)
    trocr = transformers.TrOCRConfig(
        vocab_size=len(tokenizer), d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=64, init_std=0.4, cross_attention_hidden_size=32,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, trocr)
    torch.manual_seed(seed)
    model = transformers.VisionEncoderDecoderModel(config)
    for part in (model.config, model.generation_config):
        part.pad_token_id, part.eos_token_id, part.decoder_start_token_id = 0, ENDS, 2
    transformers.ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return save_with(folder, model, tokenizer)


SEEING_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if not loop.last or message['role'] != 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Chats whose messages are strings or lists of typed parts."""


def tiny_llava(folder: str | Path, chat: bool = True, seed: int = 0) -> str:
    """A LLaVA: a CLIP that sees and a Llama that writes. :returns: its folder."""
    tokenizer = bytes_tokenizer(256, pad_token="<pad>", additional_special_tokens=["<image>"])
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3)
    text = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=token, image_seq_length=16
    )
    torch.manual_seed(seed)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=SEEING_TEMPLATE if chat else None,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = [2, *ENDS]
    return save_with(folder, model, processor)


def tiny_qwen2_audio(folder: str | Path, seed: int = 0) -> str:
    """A Qwen2-Audio: a Whisper encoder that hears two seconds and a Qwen2 that writes. :returns: its folder."""
    marks = ["<audio>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = bytes_tokenizer(512, pad_token="<pad>", additional_special_tokens=marks)
    audio = {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32,
        "max_source_positions": 100, "initializer_range": 0.3, "model_type": "qwen2_audio_encoder",
    }  # fmt: skip
    text = {
        **SIZES, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
        "initializer_range": 0.3, "model_type": "qwen2",
    }  # fmt: skip
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids("<audio>")
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2AudioForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=[2, *ENDS])
    processor = transformers.Qwen2AudioProcessor(
        transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2), tokenizer,
        chat_template=SEEING_TEMPLATE, audio_token="<audio>",
    )  # fmt: skip
    return save_with(folder, model, processor)
