"""Memory-mapped dataset of features on this machine. Does not import Ray."""

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
"""Feature column with the length of each row, such as its tokens, int64."""
ROW = "hfbatch_row"
"""Feature column with the index of the input row, int64."""
EPOCH = "hfbatch_epoch"
"""Column of taken rows with the epoch, int64 from 0; 0 for the evaluation set."""


class FeatureRows(Dataset[int]):
    """Dataset of features. Items are row numbers from 0; `take` gathers the rows of a batch.

    :param folder: path or URL of Parquet files, in order of their names.
    :param local: a folder on this machine for the memory-mapped copy.
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
        """Returns rows by number, as one chunk per column, with EPOCH: the numbers encode it, see `ShuffledRows`."""
        epochs, places = np.divmod(numbers, len(self))
        return self._rows[places.tolist()].combine_chunks().append_column(EPOCH, pa.array(epochs))

    def table(self, columns: Sequence[str] | None) -> pa.Table:
        """Returns all rows, with ROW and the given columns; None: with all columns."""
        rows = self._rows if columns is None else self._rows.select_columns([*columns, ROW])
        return rows[:].combine_chunks()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each row, int64 [rows]."""
        return self._rows.select_columns([LENGTH])[:][LENGTH].to_numpy()  # other columns may be images
