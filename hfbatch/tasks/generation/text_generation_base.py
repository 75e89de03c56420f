"""Base class of tasks that generate text token by token: decoding, and the columns beside the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hfbatch.engines.base import Capability
from hfbatch.tasks import base
from hfbatch.tasks.agreement import Comparison, Likelihood
from hfbatch.tasks.base import Histogram, Task
from hfbatch.tasks.generation.generation_config import GenerationParams, generation_faults
from hfbatch.tasks.tokens import flatten

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, StopStringCriteria

    from hfbatch.tasks.generation.constraint import Grammar
    from hfbatch.tasks.generation.decoder import Decoder

TRIAL_TOKENS = 8
"""New tokens per row in batch size trials."""
DETAILS: Mapping[str, pa.DataType] = {
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "new_tokens": pa.int32(),
}
LOG_PROBS: Mapping[str, pa.DataType] = {
    "token_ids": pa.list_(pa.int32()),
    "log_probs": pa.list_(pa.float32()),
}
EXTRA_OUTPUTS: Mapping[str, str] = {
    "finish_reason": "string, stop or length; with params.details",
    "prompt_tokens": "int32, tokens of the prompt; with params.details",
    "new_tokens": "int32; with params.details",
    "token_ids": "list<int32> of the new tokens; with params.log_probs",
    "log_probs": "list<float32>, log-probability of each new token; with params.log_probs",
}
"""Descriptions of the columns beside the text; all but prompt_tokens are lists if num_return_sequences is above 1."""


class GeneratingTask(Task):
    """Base class of text generation tasks. A subclass defines decoding options, features and the text column."""

    Params: ClassVar[type[base.Params]] = GenerationParams
    concurrent = False
    histogram = Histogram("new_tokens", tuple(float(2**k) for k in range(16)))
    ragged: ClassVar[Mapping[str, str]] = {"tokens": "length", "log_probs": "length"}
    agreement = Likelihood()

    params: Any

    @property
    @abstractmethod
    def decoding(self) -> GenerationConfig:
        """Decoding options, see `generation_config.resolve`."""

    @property
    def asks(self) -> frozenset[Capability]:
        """`generate`, see `decoder.Decoder`."""
        return frozenset({Capability.GENERATE})

    @property
    def count(self) -> int:
        """Number of texts per row."""
        return self.params.num_return_sequences

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder that calls `generate`."""
        from hfbatch.tasks.generation.decoder import Decoder

        return Decoder(
            self.decoding, self.count, self.begin_ids, self._stop(), self.params.log_probs, self.grammar
        )

    @property
    def grammar(self) -> Grammar | None:
        """What each text must be; None if nothing constrains it."""
        return None

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """Tokens that every text begins with; a token forced by the model comes first."""
        if not self.params.begin_with:
            return ()
        forced = self.decoding.forced_bos_token_id
        ids = self.tokenizer(self.params.begin_with, add_special_tokens=False)["input_ids"]
        return (*([] if forced is None else [forced]), *ids)

    def _stop(self) -> StopStringCriteria | None:
        from transformers import StopStringCriteria

        texts = self.decoding.stop_strings
        return StopStringCriteria(self.tokenizer, texts) if texts else None

    def generation_faults(self) -> list[str]:
        """Returns errors in the generation options."""
        faults = generation_faults(self.params, self.decoding)
        most = self.decoding.max_new_tokens
        if not faults and most is not None and len(self.begin_ids) > most:
            faults.append(
                f"params.begin_with has {len(self.begin_ids)} tokens, more than max_new_tokens={most}; set more"
            )
        return faults

    def seeded(self, table: pa.Table, places: pa.Table) -> pa.Table:
        """Adds a `seed` for each row when sampling, int64."""
        if not self.decoding.do_sample:
            return table
        from hfbatch.tasks.generation.sampling import row_seeds

        return table.append_column("seed", pa.array(row_seeds(self.seed, places), pa.int64()))

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates until each row reaches its end or the maximum of tokens, see `decoder.Decoder`."""
        return self.decoder(model, batch)

    def follow(
        self, model: Any, batch: dict[str, torch.Tensor], on_tokens: Callable[[list[int]], None]
    ) -> dict[str, torch.Tensor]:
        """As forward; reports the tokens of each step, see `decoder.Decoder`."""
        return self.decoder(model, batch, on_tokens=on_tokens)

    def trial_forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Generates the first few tokens."""
        return self.decoder(model, batch, TRIAL_TOKENS)

    def compare_models(self, reference: Any, model: Any, features: pa.Table) -> Comparison | None:
        """Compares the probabilities of the tokens of texts that the reference generates."""
        from hfbatch.tasks.generation.likelihood import compare_models

        batches = [self.collate(features, np.array([row]), 1) for row in range(len(features))]
        return compare_models(self.decoder, reference, model, batches)

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of new tokens per row, averaged over its texts."""
        return outputs["length"].to_numpy() / self.count

    def texts(self, outputs: pa.Table, **options: Any) -> list[str]:
        """Decodes all texts without special tokens, in row order. :param options: of `batch_decode`."""
        tokens = self._each(outputs, "tokens").to_pylist()
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True, **options)

    def grouped(self, values: pa.Array) -> pa.Array:
        """Groups one value per text by row: lists, if rows have several texts."""
        if self.count == 1:
            return values
        offsets = np.arange(0, len(values) + 1, self.count, dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    def extra_fields(self) -> list[pa.Field]:
        """The columns that `details` and `log_probs` add."""
        kinds = {**(DETAILS if self.params.details else {}), **(LOG_PROBS if self.params.log_probs else {})}
        return [
            pa.field(name, kind if name == "prompt_tokens" or self.count == 1 else pa.list_(kind))
            for name, kind in kinds.items()
        ]

    def extra_columns(self, outputs: pa.Table) -> list[pa.Array]:
        """Returns the values of `extra_fields`."""
        columns = []
        if self.params.details:
            stopped = flatten(outputs["stopped"]).flatten()
            lengths = flatten(outputs["lengths"]).flatten()
            columns += [
                self.grouped(pc.if_else(stopped, "stop", "length")),
                outputs["prompt"].combine_chunks().cast(pa.int32()),
                self.grouped(lengths.cast(pa.int32())),
            ]
        if self.params.log_probs:
            columns += [self.grouped(self._each(outputs, name)) for name in ("tokens", "log_probs")]
        return columns

    @staticmethod
    def _each(outputs: pa.Table, name: str) -> pa.ListArray:
        """Splits the lists of a column, which join the texts of a row, into one list per text."""
        lengths = flatten(outputs["lengths"]).flatten().to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), flatten(outputs[name]).flatten())
