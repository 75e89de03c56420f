"""Training token-classification: tags of words, or labels of spans of a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.base import Features, InputColumn, Params
from hfbatch.tasks.text.token_classification import TokenClassification, TokenClassificationParams
from hfbatch.tasks.text.windows import TOKENS
from hfbatch.tasks.tokens import flatten, is_text, is_words, list_lengths, lists_of, pad, text_column
from hfbatch.train.data.bio_tags import (
    Tagged,
    fault_of_spans,
    fault_of_words,
    from_spans,
    from_words,
    pieces_of,
)
from hfbatch.train.metrics.spans import OUTSIDE, PREFIXES, span_scores
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, Predicted, Recipe, faults_at

if TYPE_CHECKING:
    import torch

WORDS, SPANS = ("tokens", "tags"), ("text", "spans")
"""The two forms of a row; words take precedence if a dataset has both."""


class TokenClassificationTraining(Params):
    """Labels of tokens, and windows of long texts."""

    pieces: Literal["all", "first"] = "all"
    """Which tokens of a word are labelled with its tag. With first, the others have no target, so that predictions need
    aggregation_strategy=first."""
    stride: int = Field(default=32, ge=0)
    """Tokens that consecutive windows share, for texts longer than batch.max_length."""
    tag_names: tuple[str, ...] | None = None
    """Names of tags that are numbers, such as [O, B-PER, I-PER], from 0; default: those in the Parquet files."""


def is_tags(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds lists of names or of integers."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_words(kind) or (lists and pa.types.is_integer(kind.value_type))


def is_spans(kind: pa.DataType) -> bool:
    """Returns whether a column of this Arrow type holds lists of structs with a start, an end and a label."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(
        kind.value_type
    ):
        return False
    parts = {field.name: field.type for field in kind.value_type}
    numbers = all(pa.types.is_integer(parts.get(name, pa.null())) for name in ("start", "end"))
    return numbers and is_text(parts.get("label", pa.null()))


class TokenClassificationRecipe(Recipe):
    """Trains tagging of words. A long text is split into windows, each of them a row of the features.

    Features: `input_ids` and the like; `labels`, a class or IGNORED for each token; `word`, the index in its text
    of the word whose tag is read from a token, or -1; `tags`, the classes of all words of a text, in its first
    window; all list<int32>.
    """

    name = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    columns = (
        InputColumn("tokens", is_words, "list<string>", required=False),
        InputColumn("tags", is_tags, "list<string> or list<integer>", required=False),
        text_column("text", required=False),
        InputColumn("spans", is_spans, "list<struct<start, end, label>>", required=False),
    )
    Params = TokenClassificationTraining
    numbered: ClassVar[Mapping[str, str]] = {"tags": "tag_names"}
    params: TokenClassificationTraining
    task: TokenClassification

    @classmethod
    def task_params(
        cls, params: TokenClassificationTraining, max_length: int | None, fitted: Mapping[str, Any]
    ) -> TokenClassificationParams:
        """Returns the windows of the params, for entities, whose windows hold offsets."""
        return TokenClassificationParams(aggregation_strategy="simple", stride=params.stride)

    @property
    def metric(self) -> str:
        """F1 of spans; accuracy if every word has a tag, so that there are no spans."""
        return "f1" if OUTSIDE in self.labels else "accuracy"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics over all spans and words, and the F1 of each kind of span."""
        kinds = dict.fromkeys(label[2:] for label in self.labels if label.startswith(PREFIXES))
        return "f1", "precision", "recall", "accuracy", *(f"f1_{kind}" for kind in kinds)

    def check(self) -> list[str]:
        """Checks that the tokenizer returns offsets, and the model as the task does."""
        if not self.task.tokenizer.is_fast:
            return [
                f"model {self.task.model.name!r} has a tokenizer without offsets; use one with tokenizer.json"
            ]
        return super().check()

    def column_faults(self, present: set[str]) -> list[str]:
        """Checks that the columns of one form of a row are complete."""
        if set(WORDS) <= present or set(SPANS) <= present:
            return []
        return [
            "fine-tuning token-classification needs columns 'tokens' and 'tags', or 'text' and 'spans'; use --column "
            "tags=COLUMN"
        ]

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Counts the tags of words, converted to IOB2, and finds invalid rows."""
        statistics, faults = DatasetStatistics(len(places)), {}
        for position, row in enumerate(self._rows(columns)):
            fault = self._fault(columns, *row)
            if fault:
                faults[position] = fault
            else:
                statistics.labels.update(self._tagged(columns, *row).tags)
        statistics.faults = faults_at(faults, places)
        return statistics

    def _rows(self, columns: Mapping[str, pa.Array]) -> list[tuple[Any, Any]]:
        """Returns tokens and tags, or texts and spans; replaces tags that are numbers by their names."""
        if not has_words(columns):
            return list(zip(*(columns[name].to_pylist() for name in SPANS), strict=True))
        words, tags = (columns[name].to_pylist() for name in WORDS)
        return list(zip(words, [row and [self._tag_name(tag) for tag in row] for row in tags], strict=True))

    def _tag_name(self, tag: str | int | None) -> str | None:
        names = self.params.tag_names
        if not isinstance(tag, int):
            return tag
        return str(tag) if names is None else names[tag] if 0 <= tag < len(names) else None

    def _fault(self, columns: Mapping[str, pa.Array], first: Any, second: Any) -> str:
        """Returns the fault of a row; empty if there is none."""
        if not has_words(columns):
            return fault_of_spans(first, second)
        fault, names = fault_of_words(first, second), self.params.tag_names
        if names is not None and fault.startswith("tag "):
            return f"{fault} or beyond the {len(names)} of params.tag_names"
        return fault

    def _tagged(self, columns: Mapping[str, pa.Array], first: Any, second: Any) -> Tagged:
        return from_words(first, second) if has_words(columns) else from_spans(first, second)

    @property
    def notes(self) -> list[str]:
        """Warns if tags are numbers without names, since these do not identify words outside of spans."""
        if not self.labels or not all(label.isdigit() for label in self.labels):
            return []
        return [
            "tags are numbers without names, so that none is known to be outside of all spans; give their names in "
            "order, such as --param tag_names=[O,B-PER,I-PER]"
        ]

    def fit(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> dict[str, Any]:
        """Returns the `labels`: O, then B- and I- of each kind of span; plain tags by number or name.

        If the base model has the same labels, its order is kept. Also returns the `commonest` tag.
        """
        tags = tags_in_order(statistics.labels)
        prefixed = [tag for tag in tags if tag.startswith(PREFIXES)]
        outside = [OUTSIDE] if prefixed or OUTSIDE in statistics.labels else []
        kinds = sorted({tag[2:] for tag in prefixed})
        names = [prefix + kind for kind in kinds for prefix in PREFIXES] if prefixed else tags
        commonest = next((tag for tag, _ in statistics.labels.most_common(1)), OUTSIDE)
        labels = outside + names
        labels = self.known_labels if set(self.known_labels) == set(labels) else labels
        return {"labels": labels, "commonest": commonest}

    def train_faults(self, statistics: DatasetStatistics, types: Mapping[str, pa.DataType]) -> list[str]:
        """Checks that some word has a tag other than O, and that tags are of one form."""
        tags = tags_in_order(statistics.labels)
        prefixed = [tag for tag in tags if tag.startswith(PREFIXES)]
        if statistics.labels and not any(statistics.labels[tag] for tag in tags):
            return [f"all words of the training rows have the tag {OUTSIDE!r}; there is nothing to train on"]
        if prefixed and prefixed != tags:
            others = ", ".join(repr(tag) for tag in tags if tag not in prefixed)
            return [
                f"tags are of several forms: {others} beside {prefixed[0]!r}; write spans as B-KIND and I-KIND"
            ]
        return []

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns windows of the texts; see the class."""
        from hfbatch.train.data.rows import ROW

        texts = [self._tagged(columns, *row) for row in self._rows(columns)]
        whole = {"text": pa.array([text.text for text in texts], pa.string())}
        nested = self.task.preprocess(whole, places).table
        tokens = {name: flatten(nested[name]).flatten() for name in nested.column_names}
        sizes = list_lengths(tokens["input_ids"])
        owner = np.repeat(np.arange(len(texts)), list_lengths(nested["input_ids"]))
        window = np.repeat(np.arange(len(owner)), sizes)
        start, special = (tokens[name].flatten().to_numpy().astype(np.int64) for name in ("start", "special"))
        pieces = pieces_of(texts, owner[window], window, start, special > 0)

        index = {label: number for number, label in enumerate(self.labels)}
        classes = np.array([index[tag] for text in texts for tag in text.tags], np.int64)
        words = np.array([len(text.tags) for text in texts])
        place = np.where(pieces.is_read, pieces.word - (np.cumsum(words) - words)[owner[window]], -1)
        labels = self._targets(pieces.word, pieces.first, classes)
        first = np.diff(owner, prepend=-1) != 0
        made = {name: tokens[name] for name in TOKENS if name in tokens} | {
            "labels": lists_of(pa.array(labels, pa.int32()), sizes),
            "word": lists_of(pa.array(place, pa.int32()), sizes),
            "tags": lists_of(pa.array(classes, pa.int32()), np.where(first, words[owner], 0)),
            ROW: pa.array(owner),
        }
        return Features(pa.table(made))

    def _targets(self, word: np.ndarray, first: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Returns the target class of each token, int64 [tokens]: I- for all but the first of a word with B-."""
        inside = [
            self.labels.index("I-" + label[2:]) if label.startswith("B-") else number
            for number, label in enumerate(self.labels)
        ]
        tag = np.append(classes, IGNORED)[word]
        if self.params.pieces == "first":
            return np.where(first, tag, IGNORED)
        return np.where(first | (word < 0), tag, np.array(inside)[np.maximum(tag, 0)])

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Returns padded tokens; labels int64 [batch, tokens]."""
        import torch

        rows = np.arange(len(features))
        batch = self.task.collate(features, rows, 1)
        batch["labels"], _ = pad(features["labels"], rows, IGNORED)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def predict(self, model: Any, batch: dict[str, torch.Tensor]) -> Predicted:
        """Returns for each window the best class of each token, int32 [tokens of the longest window], and mean loss."""
        from torch.nn.functional import cross_entropy

        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        each = cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        counts, best = labels.ne(IGNORED).sum(1), logits.argmax(-1).int().cpu().numpy()
        means = (each.sum(1) / counts.clamp(min=1)).tolist()
        return Predicted(list(zip(best, means, strict=True)), float(each.sum()), int(counts.sum()))

    def score(self, predictions: list[tuple[np.ndarray, float]], features: pa.Table) -> dict[str, float]:
        """Computes span F1, precision, recall and tag accuracy over words; each counts once, in whichever window."""
        return self._scores(self._classes(predictions, features), features)

    def _classes(self, predictions: list[tuple[np.ndarray, float]], features: pa.Table) -> np.ndarray:
        """Returns the class of each word of all texts; -1 (O) for words that the tokenizer drops."""
        word, sizes = flatten(features["word"]), list_lengths(features["word"])
        place = word.flatten().to_numpy()
        best = np.concatenate([row[:size] for (row, _), size in zip(predictions, sizes, strict=True)])
        owner, words = self._words_of(features)
        firsts = np.cumsum(words) - words
        known = place >= 0
        guess = np.full(words.sum(), -1)
        guess[firsts[np.repeat(owner, sizes)[known]] + place[known]] = best[known]
        return guess

    def details(self, predictions: list[tuple[np.ndarray, float]], features: pa.Table) -> dict[str, Any]:
        """Returns the mean loss of each window's tokens, and the wrongly tagged words of its text, counted from 0."""
        truth, guess = self._tags(self._classes(predictions, features), features)
        wrong = [[at for at, tag in enumerate(row) if tag != guess[k][at]] for k, row in enumerate(truth)]
        owner = self._words_of(features)[0].tolist()
        shown = (
            [", ".join(f"word {at}: {rows[k][at]}" for at in places) for k, places in enumerate(wrong)]
            for rows in (truth, guess)
        )
        truths, guesses = ([texts[k] or "no word" for k in owner] for texts in shown)
        return {"losses": [loss for _, loss in predictions], "truths": truths, "guesses": guesses}

    def baseline(self, features: pa.Table) -> dict[str, float]:
        """Predicts the most frequent tag of the training set for each word."""
        _, words = self._words_of(features)
        return self._scores(np.full(words.sum(), self.labels.index(self.fitted["commonest"])), features)

    def _words_of(self, features: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text of each window, from 0, and the number of words of each text."""
        from hfbatch.train.data.rows import ROW

        owner = np.unique(features[ROW].to_numpy(), return_inverse=True)[1]
        return owner, np.bincount(owner, list_lengths(features["tags"])).astype(np.int64)

    def _tags(self, guess: np.ndarray, features: pa.Table) -> tuple[list[list[str]], list[list[str]]]:
        """Returns true and predicted tags of each text. :param guess: the class of each word of all texts; -1 is O."""
        names = np.array([*self.labels, OUTSIDE], object)
        cuts = np.cumsum(self._words_of(features)[1])[:-1]
        classes = flatten(features["tags"]).flatten().to_numpy(), guess
        truth, found = ([part.tolist() for part in np.split(names[tags], cuts)] for tags in classes)
        return truth, found

    def _scores(self, guess: np.ndarray, features: pa.Table) -> dict[str, float]:
        return span_scores(*self._tags(guess, features))


def tags_in_order(tags: Iterable[str]) -> list[str]:
    """Sorts tags but O by number, then by name."""
    return sorted(set(tags) - {OUTSIDE}, key=lambda tag: (int(tag) if tag.isdigit() else -1, tag))


def has_words(columns: Mapping[str, Any]) -> bool:
    """Returns whether rows are words with tags, not texts with spans."""
    return set(WORDS) <= set(columns)
