"""Task translation: translates a text into another language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from hfbatch.tasks import base
from hfbatch.tasks.base import Example
from hfbatch.tasks.generation.seq2seq import Seq2SeqParams, Seq2SeqTask
from hfbatch.tasks.generation.text_generation_base import EXTRA_OUTPUTS

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class TranslationParams(Seq2SeqParams):
    """Source and target language, and the options of text generation."""

    src_lang: str | None = None
    """Source language, as the model's tokenizer names it, for multilingual models."""
    tgt_lang: str | None = None
    """Target language, as the model's tokenizer names it."""


class Translation(Seq2SeqTask):
    """Translates each text."""

    Params: ClassVar[type[base.Params]] = TranslationParams
    name = "translation"
    aliases = ("translation_xx_to_yy",)
    general = False
    summary = "A translation of a text, by a bilingual or multilingual encoder-decoder model"
    outputs: ClassVar[Mapping[str, str]] = {"translation_text": "string", **EXTRA_OUTPUTS}
    EXAMPLE = Example({"text": ["The house is small."]}, {"src_lang": "en", "tgt_lang": "de"})

    params: TranslationParams

    @classmethod
    def params_of(cls, name: str) -> dict[str, Any] | None:
        """Returns the languages in a name such as translation_en_to_de."""
        languages = re.fullmatch("translation_(.+)_to_(.+)", name)
        if languages is None:
            return super().params_of(name)
        return {"src_lang": languages[1], "tgt_lang": languages[2]}

    @property
    def defaults_of(self) -> str:
        """The task's key in the config's `task_specific_params`, such as translation_en_to_de."""
        source, target = self.params.src_lang, self.params.tgt_lang
        return self.name if source is None and target is None else f"translation_{source}_to_{target}"

    def load_tokenizer(self, changed: bool = True, **options: Any) -> PreTrainedTokenizerBase:
        """Loads the model's tokenizer with the source and target languages set."""
        tokenizer = super().load_tokenizer(changed, **options)
        for field in ("src_lang", "tgt_lang"):
            language = getattr(self.params, field)
            if language is not None and hasattr(tokenizer, field):
                setattr(tokenizer, field, language)
        return tokenizer

    @cached_property
    def decoding(self) -> GenerationConfig:
        """Decoding options; multilingual models begin with the token of the target language."""
        config = super().decoding
        if self.params.tgt_lang is not None and hasattr(self.tokenizer, "src_lang"):
            config.forced_bos_token_id = self._language(self.params.tgt_lang)
        return config

    def _language(self, name: str) -> int:
        if hasattr(self.tokenizer, "get_lang_id"):
            return self.tokenizer.get_lang_id(name)
        return self.tokenizer.convert_tokens_to_ids(name)

    def check(self) -> list[str]:
        """Also returns errors for languages that the tokenizer does not have."""
        faults = super().check()
        if faults or not hasattr(self.tokenizer, "src_lang"):
            return faults
        for field in ("src_lang", "tgt_lang"):
            name = getattr(self.params, field)
            if name is None:
                faults.append(f"params.{field} is missing: model {self.model.name!r} is multilingual; set it")
            elif name not in self.tokenizer.get_vocab() and not hasattr(self.tokenizer, "get_lang_id"):
                known = ", ".join(self.tokenizer.all_special_tokens[:8])
                faults.append(
                    f"params.{field} {name!r} is not a language of the tokenizer (it has: {known} ...)"
                )
        return faults
