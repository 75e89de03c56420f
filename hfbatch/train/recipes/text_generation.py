"""Training text-generation: plain texts, answers to prompts, or the assistant's turns of chats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.tasks.base import Features, InputColumn, Params
from hfbatch.tasks.generation.chat import RESERVED, chat_faults, check_messages, is_chat
from hfbatch.tasks.tokens import (
    collate_text,
    length_faults,
    length_limit,
    lists_of,
    pad,
    padding_id,
    text_column,
    tokenize,
)
from hfbatch.train.data.chats import answer_tokens, find_answers
from hfbatch.train.data.sequence_packing import apart, pack, windows
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, faulty_rows
from hfbatch.train.recipes.token_loss import TokenRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from hfbatch.tasks.generation.text_generation import TextGeneration

KINDS = (("text",), ("prompt", "completion"), ("messages",))
"""Kinds of rows; the columns of exactly one kind are read."""
PACKABLE = frozenset(
    ("gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
)
"""Model types that are known to apply a 4D attention mask that the caller passes."""


class TextGenerationTraining(Params):
    """How rows become tokens."""

    packing: bool = False
    """Pack rows into blocks of batch.max_length tokens without attention between rows; batch.size counts blocks."""
    chat_template: str | None = None
    """A Jinja chat template for a model without one, or to replace its own; saved with the model."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Variables of the chat template, such as {enable_thinking: false}; give the same for prediction."""


@dataclass
class Row:
    """Token ids and labels of a training row."""

    ids: np.ndarray
    """Token ids, int32 [tokens]."""
    labels: np.ndarray
    """The token ids, but IGNORED for tokens that are not targets; the first never is, since no token precedes it."""
    source: int
    """Index of the input row."""


class TextGenerationRecipe(TokenRecipe):
    """Trains causal language models.

    The targets are: all tokens of `text`; the `completion` of a `prompt`, tokenised separately, as prediction
    decodes it separately; the assistant's turns of `messages`. Texts and completions end with the tokenizer's eos
    token, if it has one. Long texts are split into windows. Long prompts and chats are truncated at the beginning, as
    in prediction, and completions then at the end; these rows count as truncated.
    """

    name = "text-generation"
    auto_class = "AutoModelForCausalLM"
    columns = (
        *(text_column(name, required=False) for name in ("text", "prompt", "completion")),
        InputColumn("messages", is_chat, "list<struct<role: string, content: string>>", required=False),
    )
    Params = TextGenerationTraining
    params: TextGenerationTraining
    task: TextGeneration

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the task's tokenizer, which truncates prompts on the left, with the chat template of the params."""
        return self._with_template(copy(self.task.tokenizer))

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer to save with the model: as loaded from its files, with the spec's changes."""
        return self._with_template(super().processor)

    def _with_template(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        if self.params.chat_template is not None:
            tokenizer.chat_template = self.params.chat_template
        return tokenizer

    @cached_property
    def limit(self) -> int | None:
        """Maximum number of tokens of a row of the features."""
        return self.task.max_length or length_limit(self.tokenizer, self.task.config)

    def check(self) -> list[str]:
        """Rejects models that are not causal, invalid lengths, and packing for models that would mix rows."""
        faults = self.task.model_faults()
        if faults:
            return faults
        faults = length_faults(self.task.max_length, self.tokenizer, self.task.config)
        if self.task.max_length == 1:
            faults.append("batch.max_length 1 leaves no token to predict; set more")
        taken = sorted(RESERVED & set(self.params.chat_template_kwargs))
        if taken:
            faults.append(
                f"params.chat_template_kwargs cannot set {', '.join(taken)}, which training sets; leave it out"
            )
        return faults + (self._packing_faults() if self.params.packing else [])

    def _packing_faults(self) -> list[str]:
        config = self.task.config
        if config.model_type not in PACKABLE:
            return [
                f"params.packing: models of type {config.model_type!r} are not known to keep joined rows apart "
                f"(known: {', '.join(sorted(PACKABLE))}); set params.packing=false"
            ]
        if self.task.max_length is None:
            return ["params.packing needs the length of a block; set batch.max_length, such as 1024"]
        seen = (
            getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        )
        if seen is not None and self.task.max_length > seen:
            return [
                f"params.packing: blocks of batch.max_length {self.task.max_length} are longer than the {seen} tokens "
                f"of the model's sliding window; set batch.max_length to at most {seen}, or params.packing=false"
            ]
        return []

    def choose(self, found: Mapping[str, str], mapped: set[str]) -> dict[str, str]:
        """Selects the columns of the kind that the spec maps; all present ones if it maps none."""
        chosen = {name for kind in KINDS if mapped & set(kind) for name in kind}
        return {name: column for name, column in found.items() if not chosen or name in chosen}

    def column_faults(self, present: set[str]) -> list[str]:
        """Checks that the columns of exactly one kind are complete, and that chats have a chat template."""
        kinds = [kind for kind in KINDS if present & set(kind)]
        if not kinds:
            return ["no column to train on was found; use --column text=COLUMN, messages=COLUMN or "
                    "prompt=COLUMN and completion=COLUMN"]  # fmt: skip
        if len(kinds) > 1:
            shown = " and ".join(repr(name) for kind in kinds for name in kind if name in present)
            return [
                f"columns {shown} are present; map those to train on, such as --column {kinds[-1][0]}=COLUMN"
            ]
        lacking = [name for name in kinds[0] if name not in present]
        if lacking:
            return [
                f"prompt and completion go together, and {lacking[0]} is missing; use --column {lacking[0]}=COLUMN"
            ]
        return chat_faults(self.tokenizer, self.task.model.name, False) if "messages" in present else []

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Finds nulls, empty texts, and chats without an answer of the assistant."""
        if "messages" in columns:
            return DatasetStatistics(
                len(places), Counter(), faulty_rows(self._chat_faults(columns["messages"]), places)
            )
        empty = {
            f"{name} is null or empty": pc.fill_null(
                pc.equal(pc.utf8_length(column.cast(pa.string())), 0), True
            )
            for name, column in columns.items()
        }
        found = {fault: rows.to_numpy(zero_copy_only=False) for fault, rows in empty.items()}
        return DatasetStatistics(len(places), Counter(), faulty_rows(found, places))

    def _chat_faults(self, messages: pa.Array) -> dict[str, np.ndarray]:
        from jinja2 import TemplateError

        found: dict[str, np.ndarray] = {}
        for row, chat in enumerate(messages.to_pylist()):
            try:
                if chat is None:
                    raise ValueError("messages is null")
                check_messages(messages.slice(row, 1))
                find_answers(self.tokenizer, chat, self.params.chat_template_kwargs)
            except (ValueError, TemplateError) as error:
                found.setdefault(str(error), np.zeros(len(messages), bool))[row] = True
        return found

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns `input_ids` and `labels`, list<int32>; if packed, also `pieces`, the tokens of each row in a block."""
        from hfbatch.train.data.rows import ROW

        if "text" in columns:
            rows, cut = self._texts(columns["text"]), None
        elif "messages" in columns:
            rows, cut = self._chats(columns["messages"])
        else:
            rows, cut = self._pairs(columns["prompt"], columns["completion"])
        blocks = [[place] for place in range(len(rows))]
        if self.params.packing:
            blocks = pack([len(row.ids) for row in rows], self.limit or 0)
        joined = [[rows[place] for place in block] for block in blocks]
        table = {
            "input_ids": _ragged([[row.ids for row in block] for block in joined]),
            "labels": _ragged([[row.labels for row in block] for block in joined]),
            ROW: pa.array([block[0].source for block in joined], pa.int64()),
        }
        if self.params.packing:
            pieces = [[len(row.ids) for row in block] for block in joined]
            table["pieces"] = pa.array(pieces, pa.list_(pa.int32()))
        return Features(pa.table(table), cut)

    def _texts(self, texts: pa.Array) -> list[Row]:
        tokens = tokenize(self.tokenizer, texts.to_pylist()).table["input_ids"].to_pylist()
        return [
            _row(ids[window], None, source)
            for source, ids in enumerate(map(self._ended, tokens))
            for window in windows(len(ids), self.limit)
        ]

    def _pairs(self, prompts: pa.Array, completions: pa.Array) -> tuple[list[Row], np.ndarray]:
        asked = tokenize(self.tokenizer, prompts.to_pylist()).table["input_ids"].to_pylist()
        answers = tokenize(self.tokenizer, completions.to_pylist(), add_special_tokens=False)
        rows, cut = [], np.zeros(len(prompts), bool)
        least = self.tokenizer.num_special_tokens_to_add() + 1
        for source, (prompt, answer) in enumerate(
            zip(asked, answers.table["input_ids"].to_pylist(), strict=True)
        ):
            answer = self._ended(answer)
            if self.limit is not None and len(prompt) + len(answer) > self.limit:
                cut[source] = True
                room = max(self.limit - len(answer), least)
                shorter = tokenize(self.tokenizer, [prompts[source].as_py()], None, room)
                prompt = shorter.table["input_ids"][0].as_py()
                answer = answer[: self.limit - len(prompt)]
            targets = np.repeat([False, True], [len(prompt), len(answer)])
            rows.append(_row([*prompt, *answer], targets, source))
        return rows, cut

    def _chats(self, messages: pa.Array) -> tuple[list[Row], np.ndarray]:
        options = self.params.chat_template_kwargs
        found = [find_answers(self.tokenizer, chat, options) for chat in messages.to_pylist()]
        chats = answer_tokens(self.tokenizer, [text for text, _ in found], [spans for _, spans in found])
        cut = np.array([self.limit is not None and len(ids) > self.limit for ids, _ in chats], bool)
        last = slice(None if self.limit is None else -self.limit, None)
        return [_row(ids[last], targets[last], source) for source, (ids, targets) in enumerate(chats)], cut

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Pads on the right: `input_ids`, `labels`, int64 [batch, width], and `attention_mask`.

        If packed, the mask is bool [batch, 1, width, width], and `position_ids` start from 0 for each row.
        """
        import torch

        rows = np.arange(len(features))
        batch = collate_text(
            features.select(["input_ids"]), rows, padding_id(self.tokenizer, self.task.config)
        )
        batch["labels"], _ = pad(features["labels"], rows, IGNORED)
        if self.params.packing:
            batch |= apart(features["pieces"].to_pylist(), batch["input_ids"].shape[1])
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def details(self, predictions: list[np.ndarray], features: pa.Table) -> dict[str, Any]:
        """Returns the mean loss of each row's tokens; {} for packed rows."""
        return {} if self.params.packing else super().details(predictions, features)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns the token after each one. The first of a row is never a target, so that none crosses rows."""
        from torch.nn.functional import pad as extend

        return extend(labels[:, 1:], (0, 1), value=IGNORED)


def _row(ids: Iterable[int], targets: np.ndarray | None, source: int) -> Row:
    """Builds a training row. :param targets: which tokens are targets, bool [tokens]; None for all."""
    tokens = np.array(ids, np.int32)
    labels = tokens.copy() if targets is None else np.where(targets, tokens, IGNORED).astype(np.int32)
    labels[:1] = IGNORED
    return Row(tokens, labels, source)


def _ragged(blocks: list[list[np.ndarray]]) -> pa.ListArray:
    """Joins each block into one list<int32>."""
    flat = np.concatenate([np.zeros(0, np.int32), *(part for block in blocks for part in block)])
    return lists_of(pa.array(flat, pa.int32()), [sum(map(len, block)) for block in blocks])
