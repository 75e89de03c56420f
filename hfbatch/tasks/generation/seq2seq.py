"""Base class of text-to-text tasks with encoder-decoder models.

transformers 5 has no pipelines for them any more; results are those of the model's `generate` on single rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from hfbatch.tasks import base
from hfbatch.tasks.base import Batch, Features
from hfbatch.tasks.generation.generation_config import (
    GenerationParams,
    generation_notes,
    read_defaults,
    resolve,
)
from hfbatch.tasks.generation.text_generation_base import EXTRA_OUTPUTS, GeneratingTask
from hfbatch.tasks.positions import embedding_rows, has_embedding
from hfbatch.tasks.tokens import (
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
    from transformers import GenerationConfig

LONGEST = 256
"""Default of max_new_tokens if neither params nor the model set it, as in transformers' pipelines."""


class Seq2SeqParams(GenerationParams):
    """Null uses the value in the model's config for the task, then its generation_config."""

    prefix: str | None = None
    """Text prepended to each row, such as `summarize: `."""


class Seq2SeqTask(GeneratingTask):
    """Base class of tasks in which an encoder-decoder model generates a text for each text.

    A subclass names one output column, which holds the text.
    """

    Params: ClassVar[type[base.Params]] = Seq2SeqParams
    auto_class = "AutoModelForSeq2SeqLM"
    inputs = (text_column("text"),)
    split_rows = 1024

    params: Seq2SeqParams

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row."""
        return self.max_length or length_limit(self.tokenizer, self.config)

    @cached_property
    def pad_id(self) -> int:
        """The padding token id."""
        return padding_id(self.tokenizer, self.config, self.vocabulary)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Settings in the model's config for this task: a prefix and generation options."""
        known = getattr(self.config, "task_specific_params", None) or {}
        return dict(known.get(self.defaults_of) or {})

    @property
    def defaults_of(self) -> str:
        """The task's key in the config's `task_specific_params`."""
        return self.name

    @cached_property
    def prefix(self) -> str:
        """Text prepended to each row."""
        known = (self.params.prefix, self.defaults.get("prefix"), getattr(self.config, "prefix", None))
        return next((prefix for prefix in known if prefix is not None), "")

    @cached_property
    def model_defaults(self) -> GenerationConfig:
        """The model's generation settings, overridden by those in its config for the task."""
        config = read_defaults(self.model, self.config)
        config.update(**{name: value for name, value in self.defaults.items() if hasattr(config, name)})
        return config

    @cached_property
    def decoding(self) -> GenerationConfig:
        """Decoding options: the params, else the model's defaults for the task, else its general defaults."""
        config = resolve(self.model_defaults, self.params, self.tokenizer, {})
        if self.params.max_new_tokens is not None:
            config.max_length = None
        elif config.max_new_tokens is None and (
            "max_length" not in self.defaults and config.max_length in (None, 20)
        ):
            config.max_length, config.max_new_tokens = None, LONGEST
        if self.params.min_new_tokens is not None:
            config.min_length = None
        if not has_embedding(config.pad_token_id, embedding_rows(self.config, self.vocabulary)):
            config.pad_token_id = self.pad_id
        return config

    def check(self) -> list[str]:
        """Returns errors for a length beyond the model's, and for contradictory options."""
        return self.generation_faults() + length_faults(self.max_length, self.tokenizer, self.config)

    def notes(self) -> list[str]:
        """Returns notes on defaults."""
        found = [f"prepends {self.prefix!r} to each row"] if self.prefix else []
        return found + generation_notes(self.params, self.model_defaults, self.decoding)

    def output_fields(self) -> list[pa.Field]:
        """The text column, string or list of strings, and the columns that `details` and `log_probs` add."""
        name = next(name for name in self.outputs if name not in EXTRA_OUTPUTS)
        kind = pa.string() if self.count == 1 else pa.list_(pa.string())
        return [pa.field(name, kind), *self.extra_fields()]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text with the prefix. :raises ValueError: for a text without any token."""
        texts = [self.prefix + text for text in columns["text"].to_pylist()]
        made = tokenize(self.tokenizer, texts, None, self.limit, return_token_type_ids=False)
        return Features(self.seeded(require_tokens(made).table, places), made.cut)

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens in each text."""
        return list_lengths(features["input_ids"])

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns rows padded on the right, with a mask; `seed` int64 [batch] when sampling."""
        batch = collate_text(features, rows, self.pad_id, multiple, limit=self.limit)
        if "seed" in features.column_names:
            batch["seed"] = features["seed"].to_numpy()[rows]
        return batch

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the text without special tokens, and the columns that `details` and `log_probs` add."""
        return [self.grouped(pa.array(self.texts(outputs), pa.string())), *self.extra_columns(outputs)]
