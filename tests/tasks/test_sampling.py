"""Noise that makes greedy decoding sample: the numbers themselves."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import GenerationConfig, generation

from hfbatch.tasks.generation.sampling import GumbelNoise, gumbel, row_seeds, splitmix64, warpers


def places(files, rows):
    return pa.table({"file": pa.array(files, pa.string()), "row": pa.array(rows, pa.int64())})


def test_splitmix64_gives_the_numbers_of_the_published_generator():
    made = splitmix64(torch.tensor([1234567]), torch.arange(3))
    assert [number % 2**64 for number in made.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_the_noise_has_the_gumbel_distribution_and_no_correlation_between_steps():
    noise = [gumbel(splitmix64(torch.tensor([seed]), torch.arange(200_000))) for seed in (1, 2)]
    for part in noise:
        assert part.mean().item() == pytest.approx(0.5772, abs=0.01)
        assert part.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1].item()) < 0.01


def test_the_noise_is_finite_for_every_hash():
    extremes = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    assert gumbel(extremes).isfinite().all()


def test_a_row_has_its_seed_from_file_row_and_job_seed_alone():
    seeds = row_seeds(0, places(["a", "b", "a"], [0, 0, 1]))
    assert len(set(seeds.tolist())) == 3
    assert row_seeds(0, places(["a", "a", "b"], [1, 0, 0])).tolist() == seeds[[2, 0, 1]].tolist()
    assert set(row_seeds(1, places(["a", "b", "a"], [0, 0, 1])).tolist()).isdisjoint(seeds.tolist())
    assert len(row_seeds(0, places([], []))) == 0


def test_tokens_that_a_warper_ruled_out_are_never_drawn():
    scores = torch.full((2000, 50), -torch.inf)
    scores[:, [7, 31]] = 0.0
    noisy = GumbelNoise(torch.arange(2000), 4)(torch.zeros(2000, 4, dtype=torch.int64), scores)
    drawn = noisy.argmax(dim=1).bincount(minlength=50)
    assert drawn.sum() == drawn[7] + drawn[31]
    assert 900 < drawn[7] < 1100


def test_each_step_and_each_row_has_its_own_noise():
    noise = GumbelNoise(torch.tensor([1, 1, 2]), 4)
    first, second = (noise(torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, 9)) for width in (4, 5))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first, second)


def test_warpers_are_those_of_transformers_in_their_order():
    settings = {"temperature": 0.7, "top_h": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
    rare = {"typical_p": 0.9, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}
    names = [
        type(warper).__name__
        for warper in warpers(GenerationConfig(do_sample=True, **settings, **rare), "cpu")
    ]
    assert names == [
        f"{name}LogitsWarper"
        for name in ["Temperature", "TopH", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta"]
    ]
    assert warpers(GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0), "cpu") == []
    assert all(
        isinstance(warper, generation.LogitsProcessor) for warper in warpers(GenerationConfig(top_k=3), "cpu")
    )


def test_noise_does_not_depend_on_how_many_rows_are_drawn_together():
    ids, scores = (
        torch.zeros(64, 3, dtype=torch.int64),
        torch.randn(64, 33, generator=torch.Generator().manual_seed(0)),
    )
    together = GumbelNoise(torch.arange(64), 3)(ids, scores)
    apart = [GumbelNoise(torch.arange(k, k + 1), 3)(ids[:1], scores[k : k + 1]) for k in range(64)]
    assert np.array_equal(together.numpy(), torch.cat(apart).numpy())
