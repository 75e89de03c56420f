"""Training fill-mask: masked language modelling on plain texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from hfbatch.tasks.base import Features, Params
from hfbatch.tasks.text.windows import TOKENS, encode_windows
from hfbatch.tasks.tokens import collate_text, lists_of, offsets_of, pad, text_column
from hfbatch.train.recipes.base import IGNORED, DatasetStatistics, faulty_rows
from hfbatch.train.recipes.token_loss import TokenRecipe

if TYPE_CHECKING:
    import torch

    from hfbatch.tasks.text.fill_mask import FillMask

MASKED, KEPT = 0.8, 0.1
"""Shares of the selected tokens that the mask token replaces, and that are kept; random tokens replace the rest."""
FIXED = -1
"""The unit of special tokens, which are never masked."""


class FillMaskTraining(Params):
    """Which tokens are selected for prediction."""

    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens to predict, at least one in each window; 80 % masked, 10 % replaced, 10 % kept."""
    whole_words: bool = False
    """Select whole words; the share then is one of words."""


class FillMaskRecipe(TokenRecipe):
    """Trains masked language models.

    Long texts are split into windows, so that no token is lost. The selected tokens depend only on the seed, the
    epoch, the row and the window; those of the evaluation set are the same in each evaluation.
    """

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    columns = (text_column("text"),)
    Params = FillMaskTraining
    params: FillMaskTraining
    task: FillMask

    def check(self) -> list[str]:
        """Checks the model as the task does, such as for a mask token, and that its tokenizer can return windows."""
        faults = super().check()
        if not faults and not self.task.tokenizer.is_fast:
            name = self.task.model.name
            faults.append(
                f"the tokenizer of model {name!r} cannot split texts into windows; choose one with tokenizer.json"
            )
        return faults

    def validate(self, columns: Mapping[str, pa.Array], places: pa.Table) -> DatasetStatistics:
        """Finds null and empty texts."""
        empty = pc.fill_null(pc.equal(pc.utf8_length(columns["text"].cast(pa.string())), 0), True)
        found = {"text is null or empty": empty.to_numpy(zero_copy_only=False)}
        return DatasetStatistics(len(places), Counter(), faulty_rows(found, places))

    def features(self, columns: Mapping[str, pa.Array], places: pa.Table) -> Features:
        """Returns tokens of each window; `units`, equal for tokens that are masked together; `window`: list<int32>."""
        from hfbatch.train.data.rows import ROW

        tokenizer, limit = self.task.tokenizer, self.task.limit
        encoded, source = encode_windows(
            tokenizer, columns["text"].to_pylist(), truncation=limit is not None, max_length=limit
        )
        table = {name: pa.array(encoded[name], pa.list_(pa.int32())) for name in TOKENS if name in encoded}
        ids = table["input_ids"]
        values, counts = ids.values.to_numpy(), np.diff(offsets_of(ids))
        units = np.arange(len(values))
        if self.params.whole_words:
            words = (word for window in range(len(ids)) for word in encoded.word_ids(window))
            units = np.array([FIXED if word is None else word for word in words])
        units = np.where(np.isin(values, tokenizer.all_special_ids), FIXED, units)
        table["units"] = lists_of(pa.array(units, pa.int32()), counts)
        first = np.searchsorted(source, source)
        table["window"] = pa.array(np.arange(len(ids)) - first, pa.int32())
        return Features(pa.table({**table, ROW: pa.array(source, pa.int64())}))

    def collate(self, features: pa.Table) -> dict[str, torch.Tensor]:
        """Pads and masks tokens; `labels`, int64 [batch, width], has the original tokens where they are masked."""
        import torch

        from hfbatch.train.data.rows import EPOCH, ROW

        rows = np.arange(len(features))
        batch = collate_text(features, rows, self.task.pad_id, full_mask=False)
        units, _ = pad(features["units"], rows, FIXED)
        batch["labels"] = np.full_like(batch["input_ids"], IGNORED)
        for place, row in enumerate(features.select([EPOCH, ROW, "window"]).to_pylist()):
            random = np.random.default_rng([self.task.seed, *row.values()])
            ids = batch["input_ids"][place]
            hidden = hide(units[place], self.params.mask_probability, random)
            batch["labels"][place, hidden] = ids[hidden]
            ids[hidden] = self._disguised(ids[hidden], random)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _disguised(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns the tokens that replace the selected ones in the model's input."""
        kind, others = random.random(len(ids)), random.integers(len(self.task.tokenizer), size=len(ids))
        seen = np.where(kind < 1 - KEPT, others, ids)
        return np.where(kind < MASKED, self.task.tokenizer.mask_token_id, seen)


def hide(units: np.ndarray, probability: float, random: np.random.Generator) -> np.ndarray:
    """Selects tokens to predict, bool [tokens]: whole units, on average the given share of them, at least one.

    :param units: unit of each token, int [tokens]; FIXED for tokens that are never selected.
    """
    known = np.unique(units[units != FIXED])
    count = max(int(probability * len(known) + random.random()), 1)
    return np.isin(units, random.permutation(known)[:count])
