"""Task multi-vector-embedding: computes one vector for each token of a text, for late interaction as in ColBERT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from hfbatch.engines.base import Capability
from hfbatch.tasks.agreement import Vectors
from hfbatch.tasks.base import Batch, Example, Features, Histogram, TaskConfig
from hfbatch.tasks.positions import has_embedding, position_limit
from hfbatch.tasks.text.encoder import ENCODER_OF, EncoderTask
from hfbatch.tasks.text.late_files import Expansion, LateFiles, read_late_files
from hfbatch.tasks.text.pooling import DenseLayers
from hfbatch.tasks.text.prompts import PromptedTask, PromptParams
from hfbatch.tasks.text.sentence_files import Dense, misfitting
from hfbatch.tasks.tokens import (
    collate_text,
    compact,
    flatten,
    insert_behind_first,
    lengthen,
    list_lengths,
    require_tokens,
    run_text,
    text_column,
    tokenize,
)

if TYPE_CHECKING:
    import torch


class MultiVectorEmbeddingParams(PromptParams):
    """Options for the vectors of the tokens."""

    kind: Literal["document", "query"] = "document"
    """What the texts are: document leaves out the tokens that the model's files list, mostly punctuation; query pads with mask
    tokens to the model's length of queries. Each has a marker, a length and a prompt of its own in the model's files."""
    prompt_name: str | None = None
    """Name of a prompt in the model's files; default: the one that is named as the kind, if there is one."""


class MultiVectorEmbedding(PromptedTask, EncoderTask):
    """Returns vectors of tokens by the files of PyLate, of sentence-transformers or of an original ColBERT checkpoint."""

    name = "multi-vector-embedding"
    general = False
    summary = "A vector for each token of a text for late interaction, by a model such as ColBERT"
    auto_class = "AutoModel"
    inputs = (text_column("text"),)
    outputs: ClassVar[Mapping[str, str]] = {
        "embeddings": "list over tokens of fixed-size list of float32",
    }
    Params = MultiVectorEmbeddingParams
    split_rows = 512
    ragged: ClassVar[Mapping[str, str]] = {"embeddings": "count"}
    agreement = Vectors("embeddings")
    histogram = Histogram("tokens", tuple(float(2**k) for k in range(16)))
    EXAMPLE = Example({"text": ["A man is eating food.", "The cat sleeps.", ""]}, {"kind": "document"})

    params: MultiVectorEmbeddingParams

    def __init__(self, config: TaskConfig) -> None:
        super().__init__(config)
        if (self.model.read_json("config.json") or {}).get("model_type") in ENCODER_OF:
            self.auto_class = "AutoModelForTextEncoding"
        self._dense = DenseLayers(self.model.folder)

    @property
    def asks(self) -> frozenset[Capability]:
        """The outputs of the model alone, of causal models too: they are not asked for a row's last token."""
        return frozenset({Capability.FORWARD})

    @cached_property
    def recipe(self) -> LateFiles:
        """Settings from the model's files."""
        return read_late_files(self.model)

    @cached_property
    def prompt(self) -> str:
        """Text prepended to each row, behind the marker."""
        own = self.recipe.prompts.get(self.params.kind)
        if own and self.params.prompt is None and self.params.prompt_name is None:
            return own
        return super().prompt

    @property
    def marker(self) -> str:
        """The token behind the first one; empty for none."""
        return self.recipe.markers.get(self.params.kind, "")

    @property
    def expansion(self) -> Expansion | None:
        """The tokens behind short queries; None for documents, and for models without them."""
        return self.recipe.expansion if self.params.kind == "query" else None

    @property
    def reads_masked(self) -> bool:  # type: ignore[override]
        """Whether queries have vectors of tokens that their others do not see."""
        return self.expansion is not None and not self.expansion.attend

    @property
    def expansion_id(self) -> int | None:
        """The token behind short queries; None if the tokenizer has none."""
        if self.expansion is not None and self.expansion.token is not None:
            return self._token_id(self.expansion.token)
        tokens = (self.tokenizer.mask_token_id, self.tokenizer.eos_token_id)
        return next((token for token in tokens if token is not None), None)

    @cached_property
    def skipped_ids(self) -> np.ndarray:
        """Ids of tokens without a vector, int64; words that are not tokens are left out."""
        if self.params.kind not in self.recipe.skipped_of:
            return np.zeros(0, np.int64)
        found = (self._token_id(word) for word in self.recipe.skipped)
        return np.array([token for token in found if token is not None], np.int64)

    def _token_id(self, token: str) -> int | None:
        """Returns the id of a token; None if it is not one of the tokenizer."""
        number = self.tokenizer.convert_tokens_to_ids(token)
        unknown = number == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token
        return None if number is None or unknown else int(number)

    @property
    def most(self) -> int | None:
        """Maximum tokens that the model reads; the limit of the tokenizer may be that of texts without a marker."""
        positions = position_limit(self.config)
        return self.own_limit if positions is None and not self.recipe.found else positions

    @cached_property
    def limit(self) -> int | None:
        """Maximum tokens of a row, with its marker."""
        if self.max_length:
            return self.max_length
        length = self.recipe.lengths.get(self.params.kind)
        return self.own_limit if length is None else min(length, self.most or length)

    @cached_property
    def floor(self) -> int:
        """Tokens to which short queries are padded; 0 for none. With a fixed length, `batch.max_length` replaces it."""
        if self.expansion is None:
            return 0
        length = self.max_length if self.max_length and self.expansion.fixed else self.expansion.length
        return min(length, self.limit or length)

    @cached_property
    def dimension(self) -> int | None:
        """Dimension of the vectors; None if the config does not specify it."""
        dense = [step for step in self.recipe.steps if isinstance(step, Dense)]
        hidden = getattr(self.config.get_text_config(), "hidden_size", None)
        return dense[-1].out_features if dense else hidden

    def check(self) -> list[str]:
        """Returns errors in the model's files, in its tokens, in the length limit and in the prompt."""
        where = f"model {self.model.name!r}"
        faults = [f"{where}: {fault}" for fault in self.recipe.faults]
        if self.dimension is None:
            faults.append(f"{where}: its config has no hidden_size; choose a text encoder")
        return [*faults, *self._dense_faults(where), *self._token_faults(where), *self.prompt_faults()]

    def _dense_faults(self, where: str) -> list[str]:
        """Returns errors for Dense modules that do not take what they are given."""
        faults = []
        for step, given in misfitting(
            self.recipe.steps, getattr(self.config.get_text_config(), "hidden_size", None)
        ):
            name = f"Dense module {step.folder!r}" if step.folder else "linear.weight"
            faults.append(
                f"{where}: its {name} takes {step.in_features} numbers, gets {given}; download the model again"
            )
        return faults

    def _token_faults(self, where: str) -> list[str]:
        """Returns errors for tokens that the tokenizer or the model lacks, and for a length limit out of bounds."""
        faults = []
        if self.marker and not has_embedding(self._token_id(self.marker), self.embedded):
            faults.append(
                f"{where}: its marker {self.marker!r} of a {self.params.kind} is no token of its tokenizer with an embedding; "
                "load the model with the tool that trained it and save it again, which adds the token"
            )
        if self.floor and not has_embedding(self.expansion_id, self.embedded):
            shown = self.expansion.token if self.expansion else None
            faults.append(
                f"{where}: its tokenizer lacks the token with which queries are padded ({shown or 'a mask token'}); set "
                "tokenizer.special_tokens, or params.kind to document"
            )
        length, special = self.max_length, self.tokenizer.num_special_tokens_to_add() + bool(self.marker)
        if length is not None and self.most is not None and length > self.most:
            faults.append(
                f"batch.max_length {length} is more than the model's {self.most} tokens; set at most {self.most}"
            )
        elif length is not None and length <= special:
            faults.append(
                f"batch.max_length {length} leaves no room beside {special} special tokens; set more"
            )
        return faults

    def notes(self) -> list[str]:
        """Returns a note on defaults without the files of a model for late interaction, and on unused prompts."""
        notes = self.prompt_notes()
        if not self.recipe.found and not self.recipe.faults:
            notes.append(
                "no files of PyLate, MultiVectorEncoder or ColBERT beside the model: the hidden state of every token, scaled to "
                "length 1, without markers and query expansion; feature-extraction gives them unscaled"
            )
        return notes

    def output_fields(self) -> list[pa.Field]:
        """`embeddings`: list<fixed_size_list<float32>[dimension]>."""
        return [pa.field("embeddings", pa.list_(pa.list_(pa.float32(), self.dimension or 0)))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Tokenizes each text with the prompt, and adds the marker and the tokens behind short queries.

        :raises ValueError: for a text without any token.
        """
        texts = self.prompted(columns["text"].to_pylist())
        room = self.limit - 1 if self.limit and self.marker else self.limit
        made = tokenize(self.tokenizer, texts, max_length=room)
        table = made.table
        added = np.maximum(self.floor - list_lengths(table["input_ids"]) - bool(self.marker), 0)
        changed = {}
        for name in table.column_names:
            ids = name == "input_ids"
            lists = flatten(table[name])
            if self.marker:
                lists = insert_behind_first(lists, self._token_id(self.marker) or 0 if ids else 0)
            changed[name] = lengthen(lists, added, self.expansion_id or 0 if ids else 0)
        changed["added"] = pa.array(added, pa.int32())
        return require_tokens(Features(pa.table(changed), made.cut))

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns rows padded on the right, and `kept` bool [batch, width]: which tokens have a vector."""
        batch = collate_text(features, rows, self.pad_id, multiple, limit=self.limit)
        mask, ids = batch["attention_mask"], batch["input_ids"]
        kept = mask.astype(bool) & ~np.isin(ids, self.skipped_ids)
        if self.recipe.only and self.params.kind == "document":
            kept &= np.isin(ids, self.recipe.only)
        if self.expansion is not None and not self.expansion.attend:
            seen = mask.sum(1) - features["added"].to_numpy()[rows]
            batch["attention_mask"] = mask = mask * (np.arange(mask.shape[1]) < seen[:, None])
        if mask.all():  # attention takes its fastest path
            del batch["attention_mask"]
        return {**batch, "kept": kept}

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the vectors of the tokens that have one.

        :returns: `embeddings` float32 [batch, most, dimension], and `count` int32 [batch] of them in each row.
        """
        kept = batch.pop("kept")
        hidden = run_text(model, batch).last_hidden_state.float()
        count, vectors = compact(kept, self._dense.apply(self.recipe.steps, hidden))
        return {"embeddings": vectors, "count": count}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns the vectors unchanged."""
        return [flatten(outputs["embeddings"])]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the number of vectors of each row."""
        return list_lengths(outputs["embeddings"])
