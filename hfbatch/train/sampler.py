"""The order of training rows: decided by seed and epoch alone, so that a resumed training sees the same.

The last step of an epoch is filled up with NO_ROW, of which nothing is learnt: so that each row is seen once an
epoch, whatever the number of processes. (Accelerate would fill it with rows from the beginning.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

NO_ROW = -1
"""In place of a row's number: a row that counts for nothing."""


class ShuffledRows(Sampler[int]):
    """Numbers of all rows in random order, each once an epoch, in whole steps.

    A number says the epoch too: that of a row in epoch e is e × rows more than in epoch 0. So what is random
    about a row, such as its masks, can differ from epoch to epoch, whichever process makes the batch.

    :param lengths: what each row costs, int64 [rows].
    :param step: rows of an optimizer step; with `by_length`, rows of one step are of similar length: batches of
        50 steps are sorted within (transformers' `get_length_grouped_indices`), and then steps are shuffled.
    """

    def __init__(self, lengths: np.ndarray, step: int, seed: int, by_length: bool) -> None:
        self.lengths, self.step, self.seed, self.by_length = lengths, step, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.epoch)
        order = self._order(generator)
        before = self.epoch * len(order)
        return iter([before + row for row in order] + [NO_ROW] * (len(self) - len(order)))

    def _order(self, generator: torch.Generator) -> list[int]:
        """All rows; where steps are of similar lengths, the one that is not whole comes last."""
        from transformers.trainer_pt_utils import get_length_grouped_indices

        if not self.by_length:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        order = get_length_grouped_indices(self.lengths.tolist(), self.step, generator=generator)
        whole = len(order) // self.step * self.step
        steps = [order[start : start + self.step] for start in range(0, whole, self.step)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [row for place in shuffled for row in steps[place]] + order[whole:]
