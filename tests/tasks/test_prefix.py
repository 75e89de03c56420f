"""Tokens that all prompts of a batch begin with are read once, and every text stays as it is alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
)

from hfbatch.engines.base import EngineConfig, Request, RowEngine
from hfbatch.engines.torch import TorchEngine
from hfbatch.runtime.predictor import Predictor
from hfbatch.runtime.rows import RowPredictor
from hfbatch.tasks.generation.decoder import Decoder
from hfbatch.tasks.generation.prefix import (
    LONG,
    PREFIX,
    READ_POSITIONS,
    SHORTEST,
    can_share,
    group_prompts,
    share,
)
from hfbatch.tasks.generation.text_generation import TextGeneration
from tests.models.text import tiny_llama
from tests.tasks.drive import features_of, make, run

TOKENS = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPS = {"num_key_value_heads": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "falcon": {"alibi": False},
    "gemma": {"head_dim": 8, **GROUPS},
    "qwen2": GROUPS,
    "qwen3": {"head_dim": 8, **GROUPS},
    "mistral": {"sliding_window": None, **GROUPS},
    "stablelm": GROUPS,
}
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0, use_cache=True)


def batch_of(prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts padded on the left."""
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts], np.int64)
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def prompts_of(shared: int, rest: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts with so many tokens that they share, and others."""
    draw = np.random.default_rng(seed)
    begin = draw.integers(3, 200, shared).tolist()
    return [[*begin, 3 + k, *draw.integers(3, 200, length).tolist()] for k, length in enumerate(rest)]


@pytest.mark.parametrize("kind", sorted(READ_POSITIONS))
def test_texts_are_those_of_each_row_alone(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TOKENS, **SIZES, **OWN.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(6)
    assert can_share(config, GREEDY)
    prompts = prompts_of(SHORTEST + 8, [2, 9, 0, 14])
    batch = share(batch_of(prompts))
    assert batch[PREFIX] == SHORTEST + 8
    seen: list[int] = []
    model.register_forward_hook(
        lambda _, args, options, out: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}
    with torch.inference_mode():
        made = Decoder(GREEDY)(model, tensors)
        assert seen[:2] == [SHORTEST + 8, 4 * 15]
        for row, prompt in enumerate(prompts):
            alone = model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :]
            length = int(made["length"][row])
            assert made["tokens"][row, :length].tolist() == alone.tolist()
    assert made["prompt"].tolist() == [len(prompt) for prompt in prompts]


OTHERS: dict[str, PretrainedConfig] = {
    "a window": MistralConfig(**TOKENS, sliding_window=8),
    "a window in some layers": Gemma2Config(**TOKENS),
    "a window that is on": Qwen2Config(**TOKENS, use_sliding_window=True, sliding_window=8),
    "positions that depend on the length": LlamaConfig(
        **TOKENS, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "code of its own": LlamaConfig(**TOKENS, auto_map={"AutoModelForCausalLM": "code.Model"}),
    "distances in the padded text": MptConfig(vocab_size=200),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_would_count_the_padding_share_nothing(name: str) -> None:
    assert not can_share(OTHERS[name], GREEDY)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"no_repeat_ngram_size": 2}, {"stop_strings": ["."]}, {"bad_words_ids": [[3, 4]]}],
)
def test_options_that_look_at_the_prompt_share_nothing(options: dict[str, Any]) -> None:
    config = AutoConfig.for_model("llama", **TOKENS)
    assert can_share(config, GREEDY)
    assert not can_share(config, GenerationConfig(do_sample=False, **options))


@given(
    shared=st.integers(0, 80),
    rest=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_sharing_moves_padding_alone(shared: int, rest: list[int], seed: int) -> None:
    prompts = prompts_of(shared, rest, seed)
    plain = batch_of(prompts)
    made = share({**plain, "seed": np.arange(len(rest))})
    found = [
        ids[mask.astype(bool)].tolist()
        for ids, mask in zip(made["input_ids"], made["attention_mask"], strict=True)
    ]
    assert found == prompts
    assert made["input_ids"].shape == plain["input_ids"].shape
    assert made["seed"].tolist() == list(range(len(rest)))
    common = next((k for k, tokens in enumerate(zip(*prompts, strict=False)) if len({*tokens}) > 1), None)
    common = min(map(len, prompts)) - 1 if common is None else common
    assert made.get(PREFIX, 0) == (common if common >= SHORTEST and len(rest) > 1 else 0)
    first = made.get(PREFIX, 0)
    assert made["attention_mask"][:, :first].all()
    assert (np.diff(made["attention_mask"][:, first:], axis=1) >= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "log_probs": True, "details": True},
        {"do_sample": True, "num_return_sequences": 2, "repetition_penalty": 1.3},
        {"do_sample": False, "begin_with": "Yes", "constraint": {"regex": "Yes[a-z ]{4,9}"}},
    ],
)
def test_a_task_gives_what_it_gives_without_sharing(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_llama(tmp_path, max_position_embeddings=256)
    begin = "You are a helpful assistant that answers with one word. "
    columns = {"text": [begin + text for text in ("a cat", "two dogs on a mat", "", "x", "one more story")]}
    plain = make(TextGeneration, folder, max_new_tokens=12, **options)
    sharing = plain.changed(share_prefixes=True)
    assert (plain.shares, sharing.shares) == (False, True)
    batch = sharing.collate(features_of(sharing, columns).table, np.arange(5), 1)
    assert batch[PREFIX] >= SHORTEST
    want, found = run(plain, columns, size=5), run(sharing, columns, size=5)
    for name in want.column_names:
        if name == "log_probs":
            np.testing.assert_allclose(
                np.concatenate(found[name].to_pylist()), np.concatenate(want[name].to_pylist()), atol=1e-4
            )
        else:
            assert found[name].equals(want[name])
    assert len({*map(str, found["generated_text"].to_pylist())}) > 3


@given(
    kinds=st.lists(st.sampled_from([0, 31, 33, 70, 300]), min_size=1, max_size=4),
    rows=st.integers(0, 40),
    size=st.integers(1, 16),
)
def test_groups_fill_batches_with_prompts_that_begin_alike(kinds: list[int], rows: int, size: int) -> None:
    prompts = [prompts_of(kinds[k % len(kinds)], [k % 5], k % len(kinds))[0] for k in range(rows)]
    groups = group_prompts(pa.array(prompts, pa.list_(pa.int32())), size)
    for group in range(1, int(groups.max(initial=0)) + 1):
        alike = [prompts[row] for row in np.flatnonzero(groups == group)]
        assert len(alike) > 0
        long = len({tuple(prompt[:LONG]) for prompt in alike}) == 1 and len(alike[0]) > LONG
        assert len(alike) % (max(size // 4, 2) if long else size) == 0 or len(alike) % size == 0
        assert len({tuple(prompt[:SHORTEST]) for prompt in alike}) == 1
    left = [prompts[row] for row in np.flatnonzero(groups == 0)]
    for begin in {tuple(prompt[:SHORTEST]) for prompt in left if len(prompt) > SHORTEST}:
        alike = [prompt for prompt in left if len(prompt) > SHORTEST and tuple(prompt[:SHORTEST]) == begin]
        assert len(alike) < max(size, 2)


def test_prompts_with_the_same_beginning_meet_in_batches(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, max_position_embeddings=256)
    begins = [f"{name} is a helpful assistant that answers with one word. " for name in ("Ann", "Bob")]
    columns = {"text": [begins[k % 2] + str(k) for k in range(8)]}
    task = make(TextGeneration, folder, max_new_tokens=4, do_sample=False)
    engine = TorchEngine(EngineConfig(folder, task.auto_class, "float32"))
    features = features_of(task, columns).table
    plain = Predictor(task, engine, 4).predict(features)
    found = Predictor(task.changed(share_prefixes=True), engine, 4).predict(features)
    assert found.outputs["tokens"].equals(plain.outputs["tokens"])
    assert not plain.usage
    shared = found.usage["cached_tokens"]
    assert shared % 6 == 0  # three rows of each batch
    assert shared // 6 >= SHORTEST


def test_a_row_engine_gets_prompts_with_the_same_beginning_one_after_another(tmp_path: Path) -> None:
    task = make(TextGeneration, tiny_llama(tmp_path), do_sample=False).changed(share_prefixes=True)
    columns = {"text": [f"{'abc'[k % 3] * 80} {k}" for k in range(12)]}
    features = features_of(task, columns).table
    asked: list[int] = []

    class Stops(RowEngine):
        """Notes the order of its requests."""

        name, model = "stops", None

        def complete(self, requests: Sequence[Request], *_: Any) -> Iterator[Any]:
            asked.extend(request.prompt[10] for request in requests)
            return ((place, ValueError("no")) for place in range(len(requests)))

        @classmethod
        def option_faults(cls, *_: Any) -> list[str]:
            return []

        def is_out_of_memory(self, error: Exception) -> bool:
            return False

        def release_memory(self) -> None:
            """Nothing to release."""

    RowPredictor(task, Stops(), 2).predict(features)
    assert len(asked) == 12
    assert sum(a != b for a, b in pairwise(asked)) == 2
