"""Rows of tokens cut into windows or joined into blocks, and how a block's rows are kept apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np


def windows(tokens: int, size: int | None) -> Iterator[slice]:
    """Pieces of a long row in which each token but the first comes once after another one.

    A window begins with the last token of the one before it, which is context there.

    :param tokens: of the row.
    :param size: most tokens of a window, at least 2; None for no bound.
    """
    if size is None:
        yield slice(0, tokens)
        return
    for start in range(0, max(tokens - 1, 1), size - 1):
        yield slice(start, min(start + size, tokens))


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Which rows to join, so that few blocks take all: the longest first, each where it leaves the least room.

    :param lengths: tokens of each row, none above size.
    :param size: most tokens of a block.
    :returns: the rows of each block.
    """
    blocks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each block, ascending
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
    """What keeps the rows of blocks from seeing each other; padding is one more row.

    :param pieces: tokens of each row, for each block.
    :param width: tokens of the padded blocks.
    :returns: `attention_mask`, bool [blocks, 1, width, width], true where the token of a line sees the token of
        a column: one of its own row that is not behind it; `position_ids`, int64 [blocks, width], from 0 in each row.
    """
    rows, positions = np.empty((2, len(pieces), width), np.int64)
    for block, lengths in enumerate(pieces):
        counts = np.array([*lengths, width - sum(lengths)])
        rows[block] = np.repeat(np.arange(len(counts)), counts)
        positions[block] = np.arange(width) - np.repeat(np.cumsum(counts) - counts, counts)
    same = rows[:, None, :, None] == rows[:, None, None, :]
    return {"attention_mask": same & np.tri(width, dtype=bool), "position_ids": positions}
