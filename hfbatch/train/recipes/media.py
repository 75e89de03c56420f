"""Finds images and recordings that cannot be decoded, before training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from hfbatch.data.filesystem import one_line


def unreadable(
    name: str, column: pa.Array, read: Callable[[pa.Array], Iterator[Any]]
) -> dict[str, np.ndarray]:
    """Maps each reason why rows cannot be read to those rows, bool [rows].

    Decodes every file to its end, where a truncated file fails; the decoded data is not kept.

    :param name: name of the column.
    :param read: decodes rows one by one, as the task does.
    """
    found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(column), bool))
    for row in range(len(column)):
        one = column.slice(row, 1)
        if one.null_count:
            found[f"{name} is null"][row] = True
            continue
        try:
            next(read(one))
        except Exception as error:  # noqa: BLE001 - any exception of the decoder is a fault of the file
            found[f"{name} cannot be used: {one_line(error)}"][row] = True
    return found
