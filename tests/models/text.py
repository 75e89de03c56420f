"""Tokenizers, and models that read text."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = [
    f"{who} {does} {what} {when}."
    for who, does, what, when in product(
        ("The engineer", "A quiet river", "Our nightly job", "Every large cluster"),
        ("reads", "does not forget", "slowly crosses"),
        ("the blue mountain", "a table of numbers", "what the model said, word for word"),
        ("before dawn", "at 10:45 on Monday"),
    )
]
"""Seventy-two sentences that the tokenizers are trained on; also handy as input rows."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def wordpiece_tokenizer(max_length: int = 64, **options: Any) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer: lower case, WordPiece, `[CLS] a [SEP] b [SEP]`, padding on the right.

    The library's WordPiece trainer breaks ties at random, so the vocabulary is made here: words of CORPUS,
    long ones in two pieces, and every character.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = re.findall(r"\w+", " ".join(CORPUS).lower())
    pieces = {word[:5] for word in words} | {"##" + word[5:] for word in words if len(word) > 5}
    vocabulary = [*special, *characters, *(f"##{character}" for character in characters)]
    vocabulary += sorted(pieces - set(vocabulary))
    wordpiece = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(wordpiece, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        **{"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **names, **options},
    )


def bytes_tokenizer(
    max_length: int = 128, chat_template: str | None = None, pad_token: str | None = None, **options: Any
) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: byte-level BPE, `<s>` in front; no padding token unless one is named."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pad_token is not None:
        options["pad_token"] = pad_token
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )
    result.chat_template = chat_template
    return result


def save(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """Writes model and tokenizer into folder. :returns: the folder."""
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_bert(
    folder: str | Path,
    num_labels: int = 3,
    problem_type: str | None = None,
    id2label: Mapping[int, str] | None = None,
    seed: int = 0,
    **config: Any,
) -> str:
    """A BERT for sequence classification. :returns: its folder."""
    names = dict(id2label) if id2label else {index: f"LABEL_{index}" for index in range(num_labels)}
    tokenizer = wordpiece_tokenizer(config.get("max_position_embeddings", 64))
    settings = BertConfig(
        **_bert_sizes(tokenizer, config),
        problem_type=problem_type,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(settings)
    _widen(model, ("classifier",))
    return save(folder, model, tokenizer)


def tiny_bert_for(
    folder: str | Path, head: str, id2label: Mapping[int, str] | None = None, seed: int = 0, **config: Any
) -> str:
    """A BERT with another head: `TokenClassification`, `MaskedLM`, ... :returns: its folder."""
    tokenizer = wordpiece_tokenizer(config.get("max_position_embeddings", 64))
    labels = labels_of(id2label) if id2label else {}
    torch.manual_seed(seed)
    model = getattr(transformers, f"BertFor{head}")(BertConfig(**_bert_sizes(tokenizer, config), **labels))
    _widen(model, ("classifier",) if hasattr(model, "classifier") else ())
    return save(folder, model, tokenizer)


def tiny_t5(folder: str | Path, seed: int = 0, **config: Any) -> str:
    """A T5 with a word-piece tokenizer. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64)
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(tokenizer),
            initializer_factor=4.0, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, **config,
        )
    )  # fmt: skip
    return save(folder, model, tokenizer)


def tiny_bart(folder: str | Path, seed: int = 0, **config: Any) -> str:
    """A BART with a word-piece tokenizer. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(64)
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    sizes = transformers.BartConfig(
        **_decoder_sizes(), vocab_size=len(tokenizer), forced_eos_token_id=None, **tokens, **config
    )
    return save(folder, transformers.BartForConditionalGeneration(sizes), tokenizer)


def tiny_mbart(folder: str | Path, seed: int = 0) -> str:
    """A model of many languages, whose targets begin with the token of theirs. :returns: its folder."""
    characters = sorted({character for text in CORPUS for character in text if character != " "})
    pieces = [*("<unk>", "<s>", "</s>", "▁"), *characters]
    tokenizer = transformers.MBart50Tokenizer([(piece, -1.0) for piece in pieces], model_max_length=64)
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes = transformers.MBartConfig(
        **_decoder_sizes(), vocab_size=len(tokenizer), forced_eos_token_id=None, **tokens
    )
    return save(folder, transformers.MBartForConditionalGeneration(sizes), tokenizer)


def _decoder_sizes() -> dict[str, Any]:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return {**sides, **widths, "max_position_embeddings": 128, "init_std": 0.2}


def tiny_bert_encoder(folder: str | Path, seed: int = 0, **config: Any) -> str:
    """A BERT without a head. :returns: its folder."""
    tokenizer = wordpiece_tokenizer(config.get("max_position_embeddings", 64))
    torch.manual_seed(seed)
    return save(folder, BertModel(BertConfig(**_bert_sizes(tokenizer, config))), tokenizer)


def tiny_llama(
    folder: str | Path,
    chat_template: str | None = None,
    pad_token: str | None = None,
    seed: int = 0,
    **config: Any,
) -> str:
    """A Llama that generates; `chat_template=CHAT_TEMPLATE` makes it a chat model. :returns: its folder."""
    tokenizer = bytes_tokenizer(config.get("max_position_embeddings", 128), chat_template, pad_token)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_llama_sizes(tokenizer, config)))
    _widen(model, ("lm_head",))
    return save(folder, model, tokenizer)


def lora_adapter(folder: Path, base: str, rank: int = 4, merged: Path | None = None) -> Path:
    """An adapter of all linear layers with random weights, small enough that texts change and stay words. :returns: its folder.

    :param merged: a folder for the model merged with it, besides.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(plain, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    if merged is not None:
        model.merge_and_unload().save_pretrained(merged)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return folder


def tiny_llama_classifier(
    folder: str | Path, num_labels: int = 3, pad_token: str | None = None, seed: int = 0, **config: Any
) -> str:
    """A Llama for sequence classification. :returns: its folder."""
    tokenizer = bytes_tokenizer(config.get("max_position_embeddings", 128), None, pad_token)
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(**_llama_sizes(tokenizer, config), num_labels=num_labels)
    )
    _widen(model, ("score",))
    return save(folder, model, tokenizer)


def _bert_sizes(tokenizer: PreTrainedTokenizerFast, changes: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    limits = {
        "max_position_embeddings": 64,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**sizes, **limits, "initializer_range": 0.2, **changes}


def _llama_sizes(tokenizer: PreTrainedTokenizerFast, changes: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    limits = {"intermediate_size": 64, "max_position_embeddings": 128, "vocab_size": len(tokenizer)}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    return {**sizes, **limits, **tokens, "initializer_range": 0.2, **changes}


def _widen(model: PreTrainedModel, heads: tuple[str, ...]) -> None:
    """Scales the head up, so that scores differ clearly from row to row and ties do not decide a test."""
    with torch.no_grad():
        for name in heads:
            model.get_submodule(name).weight.mul_(4)


def labels_of(names: Mapping[int, str]) -> dict[str, Any]:
    """A config's names of labels, both ways."""
    return {"id2label": dict(names), "label2id": {name: index for index, name in names.items()}}
