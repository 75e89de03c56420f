"""Task fill-mask: returns the most probable tokens for a mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from hfbatch.tasks.answer_agreement import Best
from hfbatch.tasks.base import Batch, Example, Features, Histogram, Params
from hfbatch.tasks.text.encoder import EncoderTask
from hfbatch.tasks.text.heads import logits_at, narrow_head
from hfbatch.tasks.tokens import flatten, list_lengths, lists_of, pad, text_column, tokenize

if TYPE_CHECKING:
    import torch

FILLED = pa.struct(
    [("score", pa.float32()), ("token", pa.int32()), ("token_str", pa.string()), ("sequence", pa.string())]
)
_NARROWING = Lock()


class FillMaskParams(Params):
    """Which tokens to return."""

    top_k: int = Field(default=5, ge=1)
    """Number of tokens to return for each mask, best first."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Choose only among these words; a word that is not a token of the model is represented by its first token."""


class FillMask(EncoderTask):
    """Returns the most probable tokens for each mask in a text."""

    name = "fill-mask"
    summary = "The most probable tokens for a mask"
    auto_class = "AutoModelForMaskedLM"
    inputs = (text_column("text"),)
    outputs: ClassVar[Mapping[str, str]] = {
        "fills": "list over masks of list<struct<score, token, token_str, sequence>>, best first"
    }
    Params = FillMaskParams
    carried = ("input_ids", "masks")
    ragged: ClassVar[Mapping[str, str]] = {"token": "count", "score": "count"}
    agreement = Best("fills")
    histogram = Histogram("score", tuple(step / 20 for step in range(21)))
    EXAMPLE = Example({"text": ["Paris is the [MASK] of France.", "A [MASK] and a [MASK]."]}, {"top_k": 2})

    params: FillMaskParams
    _narrowed: Any = None

    @cached_property
    def targets(self) -> dict[str, int | None]:
        """Maps the words to choose among to the token that represents each; None for a word without tokens."""
        known, words = self.tokenizer.get_vocab(), self.params.targets or []
        pieces = tokenize(self.tokenizer, words, add_special_tokens=False).table["input_ids"].to_pylist()
        firsts = (next(iter(ids), None) for ids in pieces)
        return {word: known.get(word, first) for word, first in zip(words, firsts, strict=True)}

    @cached_property
    def target_ids(self) -> list[int] | None:
        """Token ids to choose among; None for all."""
        if self.params.targets is None:
            return None
        return list(dict.fromkeys(token for token in self.targets.values() if token is not None))

    def check(self) -> list[str]:
        """Also returns errors for a missing mask token, targets without tokens, and more answers than tokens."""
        faults = super().check()
        if faults:
            return faults
        if self.tokenizer.mask_token_id is None:
            faults.append(f"model {self.model.name!r} has a tokenizer without a mask token")
        if self.target_ids == []:
            faults.append(f"params.targets {self.params.targets} are not tokens of model {self.model.name!r}")
        if self.params.top_k > self.config.get_text_config().vocab_size:
            faults.append(f"params.top_k {self.params.top_k} is more than the model's tokens; set less")
        return faults

    def notes(self) -> list[str]:
        """Returns a note for each target represented by another token."""
        known, notes = self.tokenizer.get_vocab(), []
        for word, token in self.targets.items():
            if word not in known:
                instead = "nothing" if token is None else repr(self.tokenizer.convert_ids_to_tokens(token))
                notes.append(f"target {word!r} is not a token of the model: {instead} is used instead")
        return notes

    def output_fields(self) -> list[pa.Field]:
        """`fills`: for each mask of a row, the tokens that the pipeline returns."""
        return [pa.field("fills", pa.list_(pa.list_(FILLED)))]

    def preprocess(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns tokens of each text and the positions of its masks. :raises ValueError: for a text without a mask."""
        made = tokenize(self.tokenizer, columns["text"].to_pylist(), max_length=self.limit)
        ids = flatten(made.table["input_ids"])
        hits = np.flatnonzero(ids.values.to_numpy() == self.tokenizer.mask_token_id)
        starts = ids.offsets.to_numpy()
        row = np.searchsorted(starts, hits, side="right") - 1
        counts = np.bincount(row, minlength=len(ids))
        if counts.min() == 0:
            raise ValueError(
                f"No mask_token ({self.tokenizer.mask_token}) in what the model reads of the text"
            )
        masks = lists_of(pa.array(hits - starts[row], pa.int32()), counts)
        return Features(made.table.append_column("masks", masks), made.cut)

    def collate(self, features: pa.Table, rows: np.ndarray, multiple: int) -> Batch:
        """Returns token ids padded on the right, and the positions of masks, `count` of them in each row."""
        batch = super().collate(features, rows, multiple)
        batch["masks"], real = pad(features["masks"], rows, 0)
        batch["count"] = real.sum(1).astype(np.int32)
        return batch

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the most probable tokens for each mask.

        :returns: `token` int32 and `score` float32 [batch, masks, k], best first; `count` int32 [batch] of masks.
        """
        import torch

        with _NARROWING:
            if self._narrowed is not model:
                narrow_head(model)
                self._narrowed = model
        count, masks = batch.pop("count"), batch.pop("masks")
        scores = logits_at(model, batch, masks).float().softmax(-1)
        size = self.params.top_k
        if self.target_ids is not None:
            among = torch.tensor(self.target_ids, device=scores.device)
            best, place = scores[..., among].topk(min(size, len(among)))
            token = among[place]
        else:
            best, token = scores.topk(size)
        return {"token": token.to(torch.int32), "score": best.contiguous(), "count": count}

    def postprocess(self, outputs: pa.Table, columns: Mapping[str, pa.Array]) -> list[pa.Array]:
        """Returns tokens as strings, and the text with the mask replaced by each token."""
        counts = list_lengths(outputs["masks"])
        token, score = (flatten(outputs[name]).flatten() for name in ("token", "score"))
        size = token.type.list_size
        ids = token.flatten().to_numpy()
        place = np.repeat(flatten(outputs["masks"]).flatten().to_numpy(), size)
        row = np.repeat(np.repeat(np.arange(len(counts)), counts), size)
        texts = [np.array(tokens) for tokens in outputs["input_ids"].to_pylist()]
        filled = []
        for at, mask, one in zip(row, place, ids, strict=True):
            tokens = texts[at].copy()
            tokens[mask] = one
            tokens = tokens[tokens != self.tokenizer.pad_token_id]
            filled.append(self.tokenizer.decode(tokens, skip_special_tokens=bool(counts[at] == 1)))
        unique, which = np.unique(ids, return_inverse=True)
        names = pa.array([self.tokenizer.decode([one]) for one in unique.tolist()], pa.string())
        values = [
            score.flatten(),
            pa.array(ids, pa.int32()),
            names.take(pa.array(which)),
            pa.array(filled, pa.string()),
        ]
        fills = pa.StructArray.from_arrays(values, fields=list(FILLED))
        return [lists_of(lists_of(fills, np.full(len(token), size)), counts)]

    def measure(self, outputs: pa.Table, columns: list[pa.Array]) -> np.ndarray:
        """Returns the score of the best token for the first mask of each row."""
        fills = flatten(columns[0])
        scores = fills.values.values.field("score").to_numpy()
        return scores[fills.values.offsets.to_numpy()[fills.offsets.to_numpy()[:-1]]]
