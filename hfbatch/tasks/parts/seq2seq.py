"""What tasks of encoder-decoder models over text share. Knows nothing of files.

transformers 5 has no pipelines for them any more; the answer is that of the model's own `generate` for the row.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.base import Batch, Features, Histogram, Task
from hfbatch.tasks.parts.text import (
    collate_text,
    length_faults,
    length_limit,
    list_lengths,
    padding_id,
    require_tokens,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

LONGEST = 256
"""New tokens where neither params nor the model say, as in transformers' pipelines."""
PROBE_TOKENS = 8


class Seq2SeqParams(base.Params):
    """A null takes what the model's config says for the task, then its generation_config."""

    prefix: str | None = None
    """Text put before each row, such as `summarize: `."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to generate for a row; at last 256."""
    min_new_tokens: int | None = Field(default=None, ge=0)
    """Fewest tokens to generate for a row."""
    num_beams: int | None = Field(default=None, ge=1)
    """Beams of beam search; 1 takes the likeliest token at each step."""
    early_stopping: bool | None = None
    """End beam search as soon as there are num_beams finished candidates."""
    length_penalty: float | None = None
    """Above 0 favours longer texts in beam search, below 0 shorter ones."""
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    """Runs of this many tokens occur only once; 0 for no such rule."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1, makes tokens that the text already has less likely."""


class Seq2SeqTask(Task):
    """Base of tasks in which an encoder-decoder model writes a text for each text, by greedy or beam search."""

    Params: ClassVar[type[base.Params]] = Seq2SeqParams
    auto_class = "AutoModelForSeq2SeqLM"
    inputs = (text_column("text"),)
    split_rows = 1024
    concurrent = False
    histogram = Histogram("new_tokens", tuple(float(2**k) for k in range(16)))
    ragged: ClassVar[Mapping[str, str]] = {"tokens": "length"}

    params: Seq2SeqParams

    @cached_property
    def limit(self) -> int | None:
        """Most tokens of a row."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def pad_id(self) -> int:
        """The id of padding tokens."""
        return padding_id(self.tokenizer, self.config)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """What the model's config says for this task: a prefix and options of generation."""
        known = getattr(self.config, "task_specific_params", None) or {}
        return dict(known.get(self.defaults_of) or {})

    @property
    def defaults_of(self) -> str:
        """The task's key in the config's `task_specific_params`."""
        return self.name

    @cached_property
    def prefix(self) -> str:
        """Text put before each row."""
        known = (self.params.prefix, self.defaults.get("prefix"), getattr(self.config, "prefix", None))
        return next((prefix for prefix in known if prefix is not None), "")

    @cached_property
    def decoding(self) -> GenerationConfig:
        """How the next token is chosen: the params, else the model's defaults for the task, else its own."""
        from transformers import GenerationConfig

        try:
            config = GenerationConfig.from_pretrained(self.model.folder)
        except OSError:
            config = GenerationConfig.from_model_config(self.config)
        asked = {name: value for name, value in self.params.model_dump().items() if value is not None}
        asked.pop("prefix", None)
        defaults = {name: value for name, value in self.defaults.items() if hasattr(config, name)}
        if "max_new_tokens" in asked:
            defaults.pop("max_length", None)
            config.max_length = None
        elif (
            config.max_new_tokens is None and "max_length" not in defaults and config.max_length in (None, 20)
        ):
            config.max_length, config.max_new_tokens = None, LONGEST
        if "min_new_tokens" in asked:
            defaults.pop("min_length", None)
        config = copy.deepcopy(config)
        config.update(**{**defaults, **asked, "do_sample": False, "num_return_sequences": 1})
        return config

    def check(self) -> list[str]:
        """Faults: a length beyond the model's."""
        return length_faults(self.max_length, self.tokenizer, self.config)

    def notes(self) -> list[str]:
        """What the user left open."""
        found = [f"puts {self.prefix!r} before each row"] if self.prefix else []
        if self.params.max_new_tokens is None:
            most = self.decoding.max_new_tokens or self.decoding.max_length
            found.append(f"generates up to {most} tokens a row (params.max_new_tokens)")
        return found

    def output_fields(self) -> list[pa.Field]:
        """One column of strings."""
        return [pa.field(name, pa.string()) for name in self.outputs]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokens of each text, the prefix in front. :raises ValueError: for a text without any token."""
        texts = [self.prefix + text for text in columns["text"].to_pylist()]
        made = tokenize(self.tokenizer, texts, None, self.limit, return_token_type_ids=False)
        return require_tokens(made)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Tokens of each text."""
        return list_lengths(features["input_ids"])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Rows padded on the right, which the encoder does not see."""
        return collate_text(features, rows, self.pad_id, multiple, limit=self.limit)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`tokens` int32 [batch, width] without the decoder's first, and `length` int32 [batch] of those that count."""
        return self._generate(model, batch, self.decoding)

    def probe(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates the first few tokens."""
        short = copy.deepcopy(self.decoding)
        short.update(max_new_tokens=PROBE_TOKENS, max_length=None, min_new_tokens=None, min_length=0)
        return self._generate(model, batch, short)

    def _generate(
        self, model: Any, batch: dict[str, torch.Tensor], decoding: GenerationConfig
    ) -> dict[str, torch.Tensor]:
        import torch

        ids = model.generate(**batch, generation_config=decoding)[:, 1:]
        ends = decoding.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends or -1], device=ids.device)
        ended = torch.isin(ids, ends).cumsum(1)
        length = ((ended - torch.isin(ids, ends).long()) == 0).sum(1)
        return {"tokens": ids.to(torch.int32), "length": length.to(torch.int32)}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """The tokens as text, without special ones."""
        tokens = outputs["tokens"].to_pylist()
        return [pa.array(self.tokenizer.batch_decode(tokens, skip_special_tokens=True), pa.string())]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """New tokens of each row."""
        return outputs["length"].to_numpy()
