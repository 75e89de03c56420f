"""Base class of recipes for encoder-decoder models over text: target tokens, loss, and generated texts.

Evaluation generates with the task itself, its prefix and languages, so that it measures what `hfbatch predict` writes.
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

from hfbatch.tasks import base, task_class
from hfbatch.tasks.base import Features
from hfbatch.tasks.generation.seq2seq import Seq2SeqTask
from hfbatch.tasks.model_support import misfits
from hfbatch.tasks.tokens import length_faults, list_lengths, pad, text_column
from hfbatch.train.metrics.generation import perplexity
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, Predicted, Recipe, faulty_rows

if TYPE_CHECKING:
    import torch

OF_GENERATION = ("max_new_tokens", "num_beams")
"""Params that become defaults of the exported model's generation."""


class Seq2SeqTraining(base.Params):
    """Inputs, targets, and generation in evaluation."""

    prefix: str | None = None
    """Text put before each row, such as `summarize: `; null: the model config's prefix for the task."""
    max_target_length: int | None = Field(default=None, ge=1)
    """Most tokens of a target; longer ones are truncated and counted. Default: as for texts."""
    predict_with_generate: bool = True
    """Evaluate generated texts; false: only loss and perplexity, which is much faster."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to generate for a row, in evaluation and as the trained model's default; null: the model's or 256."""
    num_beams: int | None = Field(default=None, ge=1)
    """Beams of beam search, in evaluation and as the trained model's default; 1: no beam search, null: the model's."""


class Seq2SeqRecipe(Recipe):
    """Base class of recipes that train a model to generate the `target` of each `text`."""

    Params: ClassVar[type[base.Params]] = Seq2SeqTraining
    auto_class = "AutoModelForSeq2SeqLM"
    columns = (text_column("text"), text_column("target"))
    written: ClassVar[tuple[str, ...]]
    """Metrics of `compare`; the first selects the best checkpoint if texts are generated."""

    task: Seq2SeqTask
    params: Any

    @classmethod
    def task_params(cls, params: Any, max_length: int | None, fitted: Mapping[str, Any]) -> base.Params:
        """Returns the params that training and task share; evaluation does not sample."""
        kind: Any = task_class(cls.name).Params
        return kind(**params.model_dump(include=set(kind.model_fields)), do_sample=False)

    @property
    def metric(self) -> str:
        """Name of the metric that selects the best checkpoint."""
        return self.written[0] if self.params.predict_with_generate else "loss"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of tokens, and of generated texts if there are any."""
        return "perplexity", *(("ended", *self.written) if self.params.predict_with_generate else ())

    @cached_property
    def target_limit(self) -> int | None:
        """Maximum number of tokens of a target."""
        return self.params.max_target_length or self.task.limit

    def check(self) -> list[str]:
        """Checks that the model is an encoder-decoder, that its limit allows the lengths, and that targets end."""
        faults = misfits(self.task)
        if faults:
            return [
                f"{faults[0]}. Use an encoder-decoder model such as T5 or BART; train a decoder-only model on "
                "prompts and completions with task text-generation"
            ]
        tokenizer, config = self.task.tokenizer, self.task.config
        faults = super().check()
        faults += length_faults(self.params.max_target_length, tokenizer, config, "params.max_target_length")
        return faults or self._end_faults()

    def _end_faults(self) -> list[str]:
        """Checks that the tokenizer ends targets with the token that ends generation."""
        ends = self.task.decoding.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        ids = self.task.tokenizer(text_target="a")["input_ids"]
        if not ends or set(ends) & set(ids):
            return []
        return [
            f"the tokenizer of model {self.task.model.name!r} appends no end token (id {ends[0]}) to a target, so "
            "that the trained model would not stop; use one whose template adds it"
        ]

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Finds null and blank texts and targets."""
        return DatasetStatistics(
            len(places),
            faults=faulty_rows(
                {f"{name} is null or empty": _blank(columns[name]) for name in ("text", "target")}, places
            ),
        )

    def config_changes(self) -> dict[str, Any]:
        """Returns the config fields that make prefix and generation options the model's defaults for the task."""
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
        """Sets generation options and language token, so that `generate` of the exported model uses the same ones."""
        forced = self.task.decoding.forced_bos_token_id
        options = self._asked() | ({} if forced is None else {"forced_bos_token_id": forced})
        if "max_new_tokens" in options:
            options["max_length"] = None
        model.generation_config.update(**options)

    def _asked(self) -> dict[str, Any]:
        asked = {name: getattr(self.params, name) for name in OF_GENERATION}
        return {name: value for name, value in asked.items() if value is not None}

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns the task's tokens; `labels`, list<int32>; unchanged `text` and `target`, for metrics."""
        made = self.task.preprocess(columns, places)
        labels, cut = self._target_tokens(columns["target"].to_pylist())
        table = made.table.append_column("labels", labels)
        for name in ("text", "target"):
            table = table.append_column(name, columns[name].cast(pa.string()))
        return Features(table, cut if made.cut is None else made.cut | cut)

    def _target_tokens(self, texts: list[str]) -> tuple[pa.Array, np.ndarray]:
        """Returns the tokens of targets as the decoder generates them, and which were truncated, bool [rows]."""
        tokenizer, limit = self.task.tokenizer, self.target_limit
        ids = tokenizer(text_target=texts, verbose=False)["input_ids"] if texts else []
        cut = np.array([limit is not None and len(row) > limit for row in ids], bool)
        for row in np.flatnonzero(cut).tolist():
            ids[row] = tokenizer(text_target=texts[row], truncation=True, max_length=limit)["input_ids"]
        return pa.array(ids, pa.list_(pa.int32())), cut

    def lengths(self, features: pa.Table) -> np.ndarray:
        """Returns the number of tokens of text and target together."""
        return self.task.lengths(features) + list_lengths(features["labels"])

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Returns padded `input_ids`, `attention_mask`, `labels` and their `decoder_input_ids`."""
        import torch

        rows = np.arange(len(features))
        batch = self.task.collate(features, rows, 1)
        batch["labels"], _ = pad(features["labels"], rows, IGNORED)
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return {**tensors, "decoder_input_ids": self.decoder_inputs(tensors["labels"])}

    def decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """Shifts labels to the right to get the decoder's inputs, as the model itself does.

        The model's forward does it too, but only with labels, which Trainer removes from the inputs for its loss.

        :param labels: int64 [batch, width].
        """
        shift = getattr(self._skeleton, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            return shift(labels=labels)
        config = self.task.config  # as M2M100 and Blenderbot do, which lack that method
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
        """Returns for each row the summed `loss` of its tokens without smoothing, their number, and generated text."""
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
        """Generates the `text` of each row, and whether it `ended` before the maximum number of tokens."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
        kept = inner.generation_config
        made = self.task.forward(inner, {name: batch[name] for name in ("input_ids", "attention_mask")})
        inner.generation_config = kept  # forward replaces it by that of the task, which must not be exported
        tokens, counts = made["tokens"].tolist(), made["length"].tolist()
        ids = [row[:count] for row, count in zip(tokens, counts, strict=True)]
        texts = self.task.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = made["stopped"][:, 0].tolist()
        return [{"text": text, "ended": end} for text, end in zip(texts, ended, strict=True)]

    def score(self, predictions: list[dict[str, Any]], features: pa.Table) -> dict[str, float]:
        """Computes perplexity; if texts are generated, also their metrics and the share that `ended` by itself."""
        sums = [sum(row[name] for row in predictions) for name in ("loss", "tokens")]
        found = perplexity(*sums)
        if not self.params.predict_with_generate:
            return found
        found["ended"] = float(np.mean([row["ended"] for row in predictions]))
        texts = [row["text"] for row in predictions]
        return {**found, **self.compare(texts, features["target"].to_pylist())}

    def details(self, predictions: list[dict[str, Any]], features: pa.Table) -> dict[str, Any]:
        """Returns the mean loss of each target's tokens, and generated and target texts."""
        found: dict[str, Any] = {"losses": [row["loss"] / max(row["tokens"], 1) for row in predictions]}
        if self.params.predict_with_generate:
            texts = [row["text"] for row in predictions]
            found |= {"guesses": texts, "truths": features["target"].to_pylist()}
        return found

    @abstractmethod
    def compare(self, texts: list[str], targets: list[str]) -> dict[str, float]:
        """Computes the metrics named in `written` for generated texts."""

    def guess(self, text: str) -> str:
        """Returns the baseline's target for a text: the text itself."""
        return text

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Computes the metrics of `guess` if texts are generated."""
        if not self.params.predict_with_generate:
            return {}
        return self.compare(
            list(map(self.guess, features["text"].to_pylist())), features["target"].to_pylist()
        )


def _blank(texts: pa.Array) -> np.ndarray:
    """Returns which texts are null or only whitespace, bool [rows]."""
    bare = pc.utf8_trim_whitespace(texts.cast(pa.string()))
    return pc.equal(pc.utf8_length(bare), 0).fill_null(True).to_numpy(zero_copy_only=False)
