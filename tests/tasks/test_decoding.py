"""The logits processors that generate lacks."""

from __future__ import annotations

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from hfbatch.tasks.generation.decoder import BeginWith, NoRepeatBehindPadding


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("pad", [0, 3, 4])
def test_padding_is_no_token_of_a_run(size: int, pad: int) -> None:
    rows = [[3, 4], [4, 3, 4], [1, 2, 1, 2, 1], [3, 3, 3], [4, 1, 2, 4, 1]]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    together = NoRepeatBehindPadding(size, mask, 1)(ids, torch.zeros(len(rows), 6))
    alone = [NoRepeatNGramLogitsProcessor(size)(torch.tensor([row]), torch.zeros(1, 6)) for row in rows]
    assert torch.equal(together, torch.cat(alone))
    beams = NoRepeatBehindPadding(size, mask, 2)(ids.repeat_interleave(2, 0), torch.zeros(2 * len(rows), 6))
    assert torch.equal(beams, together.repeat_interleave(2, 0))


def test_a_beginning_leaves_one_token_a_step_even_a_forbidden_one() -> None:
    process, scores = BeginWith((2, 4), 3), torch.tensor([[0.1, 0.2, -torch.inf, 0.4, -0.5]])
    first = process(torch.zeros(1, 3, dtype=torch.int64), scores)
    assert first.tolist() == [[-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf]]
    second = process(torch.zeros(1, 4, dtype=torch.int64), scores)
    assert second.tolist() == [[-torch.inf] * 4 + [-0.5]]
    assert torch.equal(process(torch.zeros(1, 5, dtype=torch.int64), scores), scores)
