"""Task token-classification: returns named entities and other spans of a text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Items
from hfbatch.tasks.base import Example, Features, Histogram, InputColumn, Params
from hfbatch.tasks.labels import label_names
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.entities import (
    Spans,
    Tokens,
    continues_word,
    groups_of,
    strings_of,
    text_of,
    without_overlaps,
    words_of,
)
from hfbatch.tasks.text.windows import TOKENS, encode_windows, nest
from hfbatch.tasks.tokens import (
    flatten,
    is_words,
    list_lengths,
    lists_of,
    run_text,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding

OVER_WORDS = ("first", "average", "max")
"""Strategies that assign one label to all tokens of a word."""


class TokenClassificationParams(Params):
    """Options for grouping tokens into spans."""

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "none"
    """none returns single tokens; the others join tokens of an entity, and differ in how a word gets one label."""
    ignore_labels: list[str] = Field(default=["O"])
    """Labels to omit."""
    stride: int | None = Field(default=None, ge=0)
    """Overlap in tokens between windows of a long text; null truncates long texts. Needs an aggregation."""
    delimiter: str = " "
    """Separator with which given words are joined into the text that `start` and `end` refer to."""


class TokenClassification(EncoderTask):
    """Returns labels of tokens or of spans of tokens, with their positions in the text."""

    name = "token-classification"
    aliases = ("ner",)
    summary = "Named entities and other spans of a text, with their positions"
    auto_class = "AutoModelForTokenClassification"
    inputs = (
        text_column("text", required=False),
        InputColumn("words", is_words, "list<string>", required=False),
    )
    exclusive = ("text", "words")
    outputs: ClassVar[Mapping[str, str]] = {
        "entities": "list<struct<entity, score, index, word, start, end>>; entity_group and no index if aggregated"
    }
    Params = TokenClassificationParams
    split_rows = 2048
    windows = TOKENS
    carried = ("input_ids", "special", "start", "end")
    ragged: ClassVar[Mapping[str, str]] = {"label": "length", "score": "length"}
    agreement = Items("entities")
    histogram = Histogram("entities", (0.0, *(float(2**k) for k in range(10))))
    EXAMPLE = Example(
        {"text": ["Ada wrote to London.", "No name here.", ""]}, {"aggregation_strategy": "simple"}
    )

    params: TokenClassificationParams

    @property
    def strategy(self) -> str:
        """The aggregation strategy."""
        return self.params.aggregation_strategy

    @cached_property
    def labels(self) -> list[str]:
        """Label names by class index."""
        return label_names(self.config)

    def check(self) -> list[str]:
        """Also returns errors for the stride, and for a tokenizer that does not mark words."""
        faults = super().check()
        if faults:
            return faults
        stride = self.params.stride
        room = self.limit and self.limit - self.tokenizer.num_special_tokens_to_add()
        if stride is not None and self.strategy == "none":
            faults.append("params.stride needs an aggregation; set params.aggregation_strategy to simple")
        if stride is not None and room and stride >= room:
            faults.append(f"params.stride {stride} leaves no new tokens in a window; set at most {room - 1}")
        if not self.tokenizer.is_fast and (stride is not None or self.strategy in OVER_WORDS):
            faults.append(
                f"model {self.model.name!r} has a tokenizer that does not mark where words begin; leave "
                "params.stride out and set params.aggregation_strategy to none or simple"
            )
        return faults

    def column_faults(self, present: set[str]) -> list[str]:
        """Returns an error if there is neither text nor words."""
        if present:
            return []
        return ["task token-classification needs a column 'text' or 'words'; use --column text=COLUMN"]

    def output_fields(self) -> list[pa.Field]:
        """`entities`: a list of structs with the keys that the pipeline returns."""
        numbers = [("start", pa.int32()), ("end", pa.int32())]
        if self.strategy == "none":
            head = [("entity", pa.string()), ("score", pa.float32()), ("index", pa.int32())]
        else:
            head = [("entity_group", pa.string()), ("score", pa.float32())]
        return [pa.field("entities", pa.list_(pa.struct([*head, ("word", pa.string()), *numbers])))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text or list of words, with offsets: into one window, or with a stride into as many as needed.

        :raises ValueError: for a text without any token.
        """
        words = columns["words"].to_pylist() if "words" in columns else None
        if not self.tokenizer.is_fast:
            return self._without_offsets(columns, words)
        encoded, owner = encode_windows(
            self.tokenizer,
            columns["text"].to_pylist() if words is None else words,
            is_split_into_words=words is not None,
            truncation=self.limit is not None,
            max_length=self.limit,
            stride=self.params.stride or 0,
        )
        chosen = np.arange(len(owner))
        if self.params.stride is None:
            chosen = np.flatnonzero(np.diff(owner, prepend=-1))
        places = [self._places(encoded, k, words and words[owner[k]]) for k in chosen.tolist()]
        values = {name: [encoded[name][k] for k in chosen] for name in TOKENS if name in encoded}
        if not all(values["input_ids"]):
            raise ValueError("the text gives no token with this tokenizer; filter empty texts out")
        values["special"] = [encoded["special_tokens_mask"][k] for k in chosen.tolist()]
        values |= {"start": [place[:, 0] for place in places], "end": [place[:, 1] for place in places]}
        kept = np.bincount(owner[chosen])
        table = pa.table({name: nest(lists, kept) for name, lists in values.items()})
        return Features(table, np.bincount(owner) > kept)

    def _places(self, encoded: BatchEncoding, window: int, words: list[str] | None) -> np.ndarray:
        """Returns start and exclusive end of each token in characters, int32 [tokens, 2].

        :param words: the words, if the text is given as words; offsets then refer to the joined words.
        """
        places = np.array(encoded["offset_mapping"][window], np.int32).reshape(-1, 2)
        if words is None:
            return places
        sizes = np.array([len(word) + len(self.params.delimiter) for word in words], np.int32)
        starts = np.append(np.cumsum(sizes) - sizes, 0).astype(np.int32)
        return places + starts[[-1 if word is None else word for word in encoded.word_ids(window)]][:, None]

    def _without_offsets(self, columns: Mapping[str, pa.Array], words: list[list[str]] | None) -> Features:
        """Returns tokens without offsets, from a Python tokenizer."""
        if words is not None:
            raise ValueError("this model's tokenizer does not take words; give texts")
        made = tokenize(self.tokenizer, columns["text"].to_pylist(), max_length=self.limit)
        ids = made.table["input_ids"].to_pylist()
        special = [
            self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in ids
        ]
        one = np.ones(len(ids), np.int64)
        nested = {name: lists_of(flatten(made.table[name]), one) for name in made.table.column_names}
        return Features(pa.table({**nested, "special": nest(special, one)}), made.cut)

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the best label and its score for each token; for strategy average the scores of all labels.

        :returns: `label` int32 and `score` float32 [batch, tokens], or only `score` [batch, tokens, labels]; and
            `length` int32 [batch], the number of tokens that are not padding.
        """
        import torch

        scores = run_text(model, batch).logits.float().softmax(-1)
        mask = batch.get("attention_mask")
        length = mask.sum(1) if mask is not None else scores.new_full(scores.shape[:1], scores.shape[1])
        found = {"length": length.to(torch.int32)}
        if self.strategy == "average":
            return {"score": scores.contiguous(), **found}
        best, label = scores.max(-1)
        return {"label": label.to(torch.int32), "score": best, **found}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the entities of each text, in text order."""
        if "words" in columns:
            texts = [self.params.delimiter.join(words) for words in columns["words"].to_pylist()]
        else:
            texts = columns["text"].to_pylist()
        windows = list_lengths(outputs["special"])
        tokens, label, score = self._tokens(outputs, windows, texts)
        each = np.arange(len(tokens.id))
        if self.strategy in OVER_WORDS:
            units = words_of(tokens, continues_word(tokens, self.tokenizer), label, score, self.strategy)
        else:
            units = Spans(each, each + 1, label, score)
        found, names = units, self.labels
        if self.strategy != "none":
            found = groups_of(units, tokens.window[units.first], names)
            names = [name.split("-", 1)[-1] for name in names]
        ignored = np.array([name in self.params.ignore_labels for name in names], bool)
        found = found.take(np.flatnonzero(~ignored[found.label]))
        return [self._column(tokens, units, found, windows, names)]

    def _tokens(
        self, outputs: pa.Table, windows: np.ndarray, texts: list[str]
    ) -> tuple[Tokens, np.ndarray, np.ndarray]:
        """Returns non-special tokens of all windows, with best label and score, or with the scores of all labels."""
        special = flatten(outputs["special"]).flatten()
        sizes = list_lengths(special)
        usable = special.flatten().to_numpy() == 0

        def flat(name: str) -> np.ndarray:
            """Returns an output or feature of all usable tokens."""
            values = flatten(outputs[name]).flatten().flatten()
            if pa.types.is_fixed_size_list(values.type):
                return values.flatten().to_numpy().reshape(len(values), -1)[usable]
            return values.to_numpy()[usable]

        window = np.repeat(np.arange(len(sizes)), sizes)
        places = {
            "row": np.repeat(np.arange(len(windows)), windows)[window],
            "window": window,
            "index": np.arange(len(window)) - (np.cumsum(sizes) - sizes)[window],
        }
        start, end = (
            flat(name).astype(np.int64) if name in outputs.column_names else None for name in ("start", "end")
        )
        tokens = Tokens(
            **{name: values[usable] for name, values in places.items()},
            id=flat("input_ids"), start=start, end=end, texts=texts,
        )  # fmt: skip
        label = flat("label") if "label" in outputs.column_names else np.empty(0, np.int64)
        return tokens, label, flat("score")

    def _column(
        self, tokens: Tokens, units: Spans, found: Spans, windows: np.ndarray, names: list[str]
    ) -> pa.Array:
        """Converts entities to the type of `output_fields()`.

        :param found: runs of units.
        :param windows: number of windows of each text, int64.
        :param names: names of the label indices in `found`.
        """
        found = self._without_overlaps(tokens, units, found, windows)
        first, last = units.first[found.first], units.stop[found.stop - 1] - 1
        columns = [
            pa.array(names, pa.string()).take(pa.array(found.label)),
            pa.array(found.score, pa.float32()),
        ]
        if self.strategy == "none":
            columns.append(pa.array(tokens.index[first], pa.int32()))
            words = strings_of(tokens, first, self.tokenizer)
        else:
            words = [
                text_of(tokens, units.take(np.arange(*run)), self.strategy in OVER_WORDS, self.tokenizer)
                for run in zip(found.first, found.stop, strict=True)
            ]
        columns.append(pa.array(words, pa.string()))
        for side, places in ((tokens.start, first), (tokens.end, last)):
            column = pa.nulls(len(words), pa.int32()) if side is None else pa.array(side[places], pa.int32())
            columns.append(column)
        (field,) = self.output_fields()
        entities = pa.StructArray.from_arrays(columns, fields=list(field.type.value_type))
        return lists_of(entities, np.bincount(tokens.row[first], minlength=len(windows)))

    def _without_overlaps(self, tokens: Tokens, units: Spans, found: Spans, windows: np.ndarray) -> Spans:
        """Removes duplicates of entities found in overlapping windows of a text."""
        first, last = units.first[found.first], units.stop[found.stop - 1] - 1
        row = tokens.row[first]
        several = windows[row] > 1
        if tokens.start is None or tokens.end is None or not several.any():
            return found
        among = np.flatnonzero(several)
        start, end = tokens.start[first[among]], tokens.end[last[among]]
        among = among[without_overlaps(row[among], start, end, found.score[among])]
        places = np.concatenate([np.flatnonzero(~several), among])
        return found.take(places[np.argsort(row[places], kind="stable")])

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of entities in each row."""
        return list_lengths(columns[0])
