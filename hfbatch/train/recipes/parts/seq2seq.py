"""What recipes of encoder-decoder models over text share: tokens of targets, their loss, and texts that are written.

What is measured is what `hfbatch predict` would write: the task itself generates, with its prefix and languages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.tasks import base
from hfbatch.tasks.base import Features, Task
from hfbatch.tasks.parts.fit import misfits
from hfbatch.tasks.parts.seq2seq import Seq2SeqTask
from hfbatch.tasks.parts.text import length_faults, list_lengths, pad, text_column
from hfbatch.train.metrics.generation import perplexity
from hfbatch.train.recipes.base import IGNORED, Predicted, Recipe, Survey, faulty_rows

if TYPE_CHECKING:
    import torch

OF_GENERATION = ("max_new_tokens", "num_beams")
"""Params that the exported model writes with from then on."""


class Seq2SeqTraining(base.Params):
    """What a model reads and writes while it learns, and how it is measured."""

    prefix: str | None = None
    """Text put before each row, such as `summarize: `; null takes what the model's config says for the task."""
    max_target_length: int | None = Field(default=None, ge=1)
    """Most tokens of a target; longer ones are truncated and counted. Default: as for texts."""
    predict_with_generate: bool = True
    """Measure the texts that the model writes; false measures loss and perplexity alone, which is much quicker."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that it writes for a row, now and once it is trained; null takes the model's own number, or 256."""
    num_beams: int | None = Field(default=None, ge=1)
    """Beams of its beam search, now and once it is trained; 1 is none, null takes the model's own number."""


class Seq2SeqRecipe(Recipe):
    """Base of recipes in which a model learns to write the `target` of each `text`."""

    Params: ClassVar[type[base.Params]] = Seq2SeqTraining
    auto_class = "AutoModelForSeq2SeqLM"
    columns = (text_column("text"), text_column("target"))
    written: ClassVar[tuple[str, ...]]
    """Metrics of `compare`; the first decides which checkpoint is the best, where texts are written."""

    task: Seq2SeqTask
    params: Any

    def __init__(
        self, task: Task, params: Any, label_smoothing: float = 0.0, settled: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(task, params, label_smoothing, settled)
        kind = type(self.task.params)
        shared = params.model_dump(include=set(kind.model_fields))
        self.task.params = kind(**shared, do_sample=False)

    @property
    def metric(self) -> str:
        """What decides which checkpoint is the best."""
        return self.written[0] if self.params.predict_with_generate else "loss"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of tokens, and of what the model writes, if it does."""
        return "perplexity", *(("ended", *self.written) if self.params.predict_with_generate else ())

    @cached_property
    def target_limit(self) -> int | None:
        """Most tokens of a target."""
        return self.params.max_target_length or self.task.limit

    def check(self) -> list[str]:
        """Faults: a model that is no encoder-decoder, lengths beyond its own, targets without an end."""
        faults = misfits(self.task)
        if faults:
            return [
                f"{faults[0]}. Take an encoder-decoder model such as T5 or BART; a decoder-only model learns "
                "prompts and their answers with task text-generation"
            ]
        tokenizer, config = self.task.tokenizer, self.task.config
        faults = super().check()
        faults += length_faults(self.params.max_target_length, tokenizer, config, "params.max_target_length")
        return faults or self._end_faults()

    def _end_faults(self) -> list[str]:
        """The fault of a tokenizer that lets targets end without the token that ends generation."""
        ends = self.task.decoding.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        ids = self.task.tokenizer(text_target="a")["input_ids"]
        if not ends or set(ends) & set(ids):
            return []
        return [
            f"the tokenizer of model {self.task.model.name!r} puts no end token (id {ends[0]}) behind a target, so "
            "that the model would not learn to stop; take one whose template adds it"
        ]

    def examine(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Survey:
        """Finds texts and targets that are null or blank."""
        return Survey(
            len(places),
            faults=faulty_rows(
                {f"{name} is null or empty": _blank(columns[name]) for name in ("text", "target")}, places
            ),
        )

    def config_changes(self) -> dict[str, Any]:
        """What the task is to write with from then on: prefix and options as the model's defaults for the task."""
        config, own = self.task.config, dict(self.task.defaults)
        if self.params.max_new_tokens is not None:
            own.pop("max_length", None)
        known = getattr(config, "task_specific_params", None) or {}
        own = {**own, "prefix": self.task.prefix, **self._asked()}
        changes: dict[str, Any] = {"task_specific_params": {**known, self.task.defaults_of: own}}
        if getattr(config.get_text_config(), "pad_token_id", None) is None:
            changes["pad_token_id"] = self.task.pad_id
        return changes

    def prepare(self, model: Any) -> None:
        """Plain `generate` of the exported model writes in the same way: options, and the token of the language."""
        forced = self.task.decoding.forced_bos_token_id
        options = self._asked() | ({} if forced is None else {"forced_bos_token_id": forced})
        if "max_new_tokens" in options:
            options["max_length"] = None
        model.generation_config.update(**options)

    def _asked(self) -> dict[str, Any]:
        asked = {name: getattr(self.params, name) for name in OF_GENERATION}
        return {name: value for name, value in asked.items() if value is not None}

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """The task's tokens; `labels`, list<int32>; `text` and `target` as they are, for metrics."""
        made = self.task.preprocess(columns, places)
        labels, cut = self._target_tokens(columns["target"].to_pylist())
        table = made.table.append_column("labels", labels)
        for name in ("text", "target"):
            table = table.append_column(name, columns[name].cast(pa.string()))
        return Features(table, cut if made.cut is None else made.cut | cut)

    def _target_tokens(self, texts: list[str]) -> tuple[pa.Array, np.ndarray]:
        """Tokens of targets as the decoder writes them, and which were cut, bool [rows]."""
        tokenizer, limit = self.task.tokenizer, self.target_limit
        ids = tokenizer(text_target=texts, verbose=False)["input_ids"] if texts else []
        cut = np.array([limit is not None and len(row) > limit for row in ids], bool)
        for row in np.flatnonzero(cut).tolist():
            ids[row] = tokenizer(text_target=texts[row], truncation=True, max_length=limit)["input_ids"]
        return pa.array(ids, pa.list_(pa.int32())), cut

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Tokens of text and target together."""
        return self.task.lengths(features) + list_lengths(features["labels"])

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Padded `input_ids`, `attention_mask`, and `labels` with the `decoder_input_ids` for them."""
        import torch

        rows = np.arange(len(features))
        batch = self.task.collate(features, rows, 1)
        batch["labels"], _ = pad(features["labels"], rows, IGNORED)
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return {**tensors, "decoder_input_ids": self.decoder_inputs(tensors["labels"])}

    def decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """What the decoder reads before it writes each label, as the model itself makes it: the label before.

        The models' forward would do it too, but Trainer keeps the labels back for the loss.

        :param labels: int64 [batch, width].
        """
        shift = getattr(self._skeleton, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            return shift(labels=labels)
        config = self.task.config  # what M2M100 and Blenderbot do, which have no such method
        shifted = labels.roll(1, dims=1)
        shifted[:, 0] = config.decoder_start_token_id
        return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)

    @cached_property
    def _skeleton(self) -> Any:
        """The model without weights."""
        import torch
        import transformers

        with torch.device("meta"):
            return getattr(transformers, self.auto_class).from_config(
                self.task.config, trust_remote_code=self.task.model.trust_remote_code
            )

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """For each row the sum of its tokens' `loss` without smoothing, their number, and what the model writes."""
        from torch.nn.functional import cross_entropy

        labels = batch["labels"]
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = outputs.logits.float().flatten(0, 1)
        each = cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        counts = labels.ne(IGNORED).sum(dim=1).tolist()
        losses = each.reshape(labels.shape).sum(dim=1).tolist()
        rows = [{"loss": loss, "tokens": count} for loss, count in zip(losses, counts, strict=True)]
        if self.params.predict_with_generate:
            rows = [{**row, **text} for row, text in zip(rows, self._write(model, batch), strict=True)]
        return Predicted(rows, float(self.loss(outputs, labels, 1)), sum(counts))

    def _write(self, model: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """The `text` of each row, and whether it is `ended`, not broken off at the most tokens."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
        kept = inner.generation_config
        made = self.task.forward(inner, {name: batch[name] for name in ("input_ids", "attention_mask")})
        inner.generation_config = kept  # forward leaves the task's own in its place, which is not for export
        tokens, counts = made["tokens"].tolist(), made["length"].tolist()
        ids = [row[:count] for row, count in zip(tokens, counts, strict=True)]
        texts = self.task.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = made["stopped"][:, 0].tolist()
        return [{"text": text, "ended": end} for text, end in zip(texts, ended, strict=True)]

    def score(self, predictions: list[dict[str, Any]], features: pa.Table) -> dict[str, float]:
        """Perplexity; where texts are written, their metrics and the share that `ended` by itself."""
        sums = [sum(row[name] for row in predictions) for name in ("loss", "tokens")]
        found = perplexity(*sums)
        if not self.params.predict_with_generate:
            return found
        found["ended"] = float(np.mean([row["ended"] for row in predictions]))
        texts = [row["text"] for row in predictions]
        return {**found, **self.compare(texts, features["target"].to_pylist())}

    def details(self, predictions: list[dict[str, Any]], features: pa.Table) -> dict[str, Any]:
        """The mean loss of each target's tokens; what is written beside what should be."""
        found: dict[str, Any] = {"losses": [row["loss"] / max(row["tokens"], 1) for row in predictions]}
        if self.params.predict_with_generate:
            texts = [row["text"] for row in predictions]
            found |= {"guesses": texts, "truths": features["target"].to_pylist()}
        return found

    @abstractmethod
    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Metrics of texts: those of `written`."""

    def guess(self, text: str) -> str:
        """What stands for the target without a model: the text itself."""
        return text

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Metrics of `guess`, where texts are written."""
        if not self.params.predict_with_generate:
            return {}
        return self.compare(
            list(map(self.guess, features["text"].to_pylist())), features["target"].to_pylist()
        )


def _blank(texts: pa.Array) -> np.ndarray:
    """Which texts are null or nothing but space, bool [rows]."""
    bare = pc.utf8_trim_whitespace(texts.cast(pa.string()))
    return pc.equal(pc.utf8_length(bare), 0).fill_null(True).to_numpy(zero_copy_only=False)
