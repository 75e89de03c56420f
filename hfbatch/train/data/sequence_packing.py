"""Splits token rows into windows or packs them into blocks, with masks that separate the rows of a block."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np


def windows(tokens: int, size: int | None) -> Iterator[slice]:
    """Splits a long row into windows in which each token but the first is a target exactly once.

    A window begins with the last token of the one before it, as context.

    :param tokens: tokens of the row.
    :param size: maximum tokens of a window, at least 2; None for no limit.
    """
    if size is None:
        yield slice(0, tokens)
        return
    for start in range(0, max(tokens - 1, 1), size - 1):
        yield slice(start, min(start + size, tokens))


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Packs rows into few blocks by best-fit decreasing: the longest first, each where it leaves the least room.

    :param lengths: tokens of each row, none above size.
    :param size: maximum tokens of a block.
    :returns: the rows of each block.
    """
    blocks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left in each block, ascending
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[row])
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            blocks.append([])
            room, block = size, len(blocks) - 1
        else:
            room, block = rooms.pop(place)
        blocks[block].append(row)
        insort(rooms, (room - length, block))
    return blocks


def apart(pieces: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
    """Builds masks that prevent attention between the rows of blocks; padding is one more row.

    :param pieces: tokens of each row, for each block.
    :param width: tokens of the padded blocks.
    :returns: `attention_mask`, bool [blocks, 1, width, width], causal and true only within a row: [..., i, j] is
        whether token i attends to token j; `position_ids`, int64 [blocks, width], from 0 in each row.
    """
    rows, positions = np.empty((2, len(pieces), width), np.int64)
    for block, lengths in enumerate(pieces):
        counts = np.array([*lengths, width - sum(lengths)])
        rows[block] = np.repeat(np.arange(len(counts)), counts)
        positions[block] = np.arange(width) - np.repeat(np.cumsum(counts) - counts, counts)
    same = rows[:, None, :, None] == rows[:, None, None, :]
    return {"attention_mask": same & np.tri(width, dtype=bool), "position_ids": positions}
