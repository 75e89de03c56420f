"""Finds the rows that make a function fail, so that only they are rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

Result = TypeVar("Result")


def isolate(
    function: Callable[[np.ndarray], Result], rows: np.ndarray, fatal: tuple[type[Exception], ...] = ()
) -> tuple[list[tuple[np.ndarray, Result]], list[tuple[int, Exception]]]:
    """Calls function on rows; if it raises, on each half, down to single rows.

    A failing row among n costs about 2 log2(n) more calls.

    :param rows: int64 [n], passed on in order.
    :param fatal: errors not caused by rows, which are raised.
    :returns: the results with their rows, in order, and the rows that raised, each with its error.
    """
    try:
        return [(rows, function(rows))], []
    except fatal:
        raise
    except Exception as error:  # noqa: BLE001 - any error of a row is its reject reason
        if len(rows) == 1:
            return [], [(int(rows[0]), error)]
    middle = len(rows) // 2
    results, failures = isolate(function, rows[:middle], fatal)
    more_results, more_failures = isolate(function, rows[middle:], fatal)
    return results + more_results, failures + more_failures
