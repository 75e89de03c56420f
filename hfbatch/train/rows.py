"""Features of a training on this machine: memory-mapped, with an exact length. Knows nothing of models and of Ray."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from torch.utils.data import Dataset

from hfbatch.data.filesystem import open_filesystem

LENGTH = "hfbatch_length"
"""The column of features that says what each row costs, int64."""
ROW = "hfbatch_row"
"""The column of features that says which row of the input each one is of, int64."""
EPOCH = "hfbatch_epoch"
"""The column of taken rows that says for which time each is seen, int64 from 0; 0 for rows to measure with."""


class FeatureRows(Dataset[int]):
    """Features as rows by their number, from 0; an item is its own number, and `take` gathers a batch.

    :param folder: path or URL of Parquet files, in order of their names.
    :param local: a folder on this machine for the copy that is mapped into memory.
    """

    def __init__(self, folder: str, local: Path) -> None:
        from datasets import load_dataset
        from datasets.utils import disable_progress_bars

        disable_progress_bars()
        fs, root = open_filesystem(folder)
        if not isinstance(fs, pafs.LocalFileSystem):
            here = local / "parquet"
            here.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(root, str(here), fs, pafs.LocalFileSystem())
            root = str(here)
        files = sorted(map(str, Path(root).glob("*.parquet")))
        loaded: Any = load_dataset("parquet", data_files=files, split="train", cache_dir=str(local / "arrow"))
        self._rows = loaded.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> int:
        return number

    def take(self, numbers: list[int]) -> pa.Table:
        """Rows by their numbers, as one chunk each column, with the EPOCH: numbers go on counting in each, see sampler."""
        epochs, places = np.divmod(numbers, len(self))
        return self._rows[places.tolist()].combine_chunks().append_column(EPOCH, pa.array(epochs))

    def table(self, columns: Sequence[str] | None) -> pa.Table:
        """All rows, with ROW and some other columns; None: with all of them."""
        rows = self._rows if columns is None else self._rows.select_columns([*columns, ROW])
        return rows[:].combine_chunks()

    @cached_property
    def lengths(self) -> np.ndarray:
        """What each row costs, int64 [rows]."""
        return self._rows.select_columns([LENGTH])[:][LENGTH].to_numpy()  # of the others, some are pictures
