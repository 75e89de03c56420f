"""Base class of tasks that prepare texts as the files beside a model say: prompts, case and maximum length."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from hfbatch.tasks.base import Params, Task
from hfbatch.tasks.positions import position_limit
from hfbatch.tasks.text.sentence_files import TextFiles
from hfbatch.tasks.tokens import length_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptParams(Params):
    """Options for the text in front of each row."""

    prompt: str | None = None
    """Text prepended to each row, such as "query: "."""
    prompt_name: str | None = None
    """Name of a prompt in the model's files; default: the model's default prompt, if it has one."""


class PromptedTask(Task):
    """Base class of tasks whose texts the model's files prepare."""

    lasting = ("config", "recipe", "tokenizer")

    params: PromptParams

    @cached_property
    def recipe(self) -> TextFiles:
        """Settings from the model's files."""
        raise NotImplementedError

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which lowercases if the model's files say so."""
        tokenizer = super().tokenizer
        if self.recipe.lowercase and tokenizer.is_fast:
            from tokenizers.normalizers import Lowercase, Sequence

            own = tokenizer.backend_tokenizer.normalizer
            tokenizer.backend_tokenizer.normalizer = Sequence(
                [Lowercase(), *([own] if own is not None else [])]
            )
        return tokenizer

    @property
    def own_limit(self) -> int | None:
        """Maximum tokens by the model's files; those of sentence-transformers may count positions that no token has."""
        if not self.recipe.max_length:
            return length_limit(self.tokenizer, self.config)
        return min(self.recipe.max_length, position_limit(self.config) or self.recipe.max_length)

    @cached_property
    def prompt(self) -> str:
        """Text prepended to each row."""
        if self.params.prompt is not None:
            return self.params.prompt
        name = self.params.prompt_name or self.recipe.default_prompt
        return self.recipe.prompts.get(name, "") if name else ""

    def prompted(self, texts: list[str]) -> list[str]:
        """Returns texts with the prompt, as the tokenizer takes them."""
        return self._cased([self.prompt + text for text in texts] if self.prompt else texts)

    def _cased(self, texts: list[str]) -> list[str]:
        """Lowercases texts if the tokenizer should do it but has no normalizer."""
        if self.recipe.lowercase and not self.tokenizer.is_fast:
            return [text.lower() for text in texts]
        return texts

    def prompt_faults(self) -> list[str]:
        """Returns errors in the params of the prompt."""
        faults = []
        params, prompts = self.params, self.recipe.prompts
        if params.prompt is not None and params.prompt_name is not None:
            faults.append("params.prompt and params.prompt_name are both set; leave one out")
        if params.prompt_name is not None and params.prompt_name not in prompts:
            has = ", ".join(sorted(prompts)) or "no prompts"
            faults.append(
                f"params.prompt_name {params.prompt_name!r} is not in model {self.model.name!r} (has: {has}); use params.prompt"
            )
        return faults

    def prompt_notes(self) -> list[str]:
        """Returns a note on prompts of the model that are not used."""
        if not self.recipe.prompts or self.prompt or self.params.prompt is not None:
            return []
        names = ", ".join(self.recipe.prompts)
        return [f"the model comes with prompts ({names}) and none is used; set params.prompt_name to use one"]
