"""Pictures and recordings that cannot be learnt from, found before training."""

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
    """What keeps rows from being read, and which rows, bool [rows].

    Every file is decoded whole, since one that is cut off shows it only at its end; what is decoded is not kept.

    :param name: of the column.
    :param read: what decodes rows one by one, as the task does.
    """
    found: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(column), bool))
    for row in range(len(column)):
        one = column.slice(row, 1)
        if one.null_count:
            found[f"{name} is null"][row] = True
            continue
        try:
            next(read(one))
        except Exception as error:  # noqa: BLE001 - whatever a file raises is what is wrong with it
            found[f"{name} cannot be used: {one_line(error)}"][row] = True
    return found
