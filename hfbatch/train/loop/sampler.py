"""The order of training rows. It depends only on seed and epoch, so that a resumed training sees the same order.

The last step of an epoch is padded with NO_ROW, which does not enter the loss, so that each row is seen once per
epoch with any number of processes. (Accelerate would pad it with rows from the beginning.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

NO_ROW = -1
"""Number of a padding row, whose labels are ignored."""


class ShuffledRows(Sampler[int]):
    """Yields the numbers of all rows in random order, each once per epoch, in whole steps.

    A number encodes the epoch too: in epoch e, that of a row is e × rows more than in epoch 0. So random choices
    for a row, such as its masks, can differ between epochs, in whichever process collates the batch.

    :param lengths: length of each row, int64 [rows].
    :param step: rows of an optimizer step; with `by_length`, rows of one step are of similar length: batches of
        50 steps are sorted within (transformers' `get_length_grouped_indices`), and then steps are shuffled.
    """

    def __init__(self, lengths: np.ndarray, step: int, seed: int, by_length: bool) -> None:
        self.lengths, self.step, self.seed, self.by_length = lengths, step, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 7919 * self.epoch)
        order = self._order(generator)
        before = self.epoch * len(order)
        return iter([before + row for row in order] + [NO_ROW] * (len(self) - len(order)))

    def _order(self, generator: torch.Generator) -> list[int]:
        """Returns all rows in order; with `by_length`, the incomplete step comes last."""
        from transformers.trainer_pt_utils import get_length_grouped_indices

        if not self.by_length:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        order = get_length_grouped_indices(self.lengths.tolist(), self.step, generator=generator)
        whole = len(order) // self.step * self.step
        steps = [order[start : start + self.step] for start in range(0, whole, self.step)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [row for place in shuffled for row in steps[place]] + order[whole:]
