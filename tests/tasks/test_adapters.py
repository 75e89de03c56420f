"""Adapters as models: which folders are one, what an engine runs of it, and what the plan says of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hfbatch.engines.adapters import plain_lora_faults, rank_limit
from hfbatch.errors import SpecError
from hfbatch.hub.models import Model, pin
from hfbatch.runtime.config import RunnerConfig
from hfbatch.spec.job import JobSpec, ModelSpec
from tests.models.text import lora_adapter, tiny_llama

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as peft writes it."""
    return lora_adapter(tmp_path_factory.mktemp("saved"), llama)


@pytest.fixture
def changed(saved: Path, tmp_path: Path) -> Change:
    def made(**settings: Any) -> Path:
        """The adapter with other settings; those that are `...` are left out."""
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        config = json.loads((saved / "adapter_config.json").read_text()) | settings
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
        return folder

    return made


def pinned(folder: Path) -> Model:
    return pin(ModelSpec(name=str(folder)), adapters=True)


def fault_of(folder: Path) -> str:
    """The only fault of an adapter's files."""
    with pytest.raises(SpecError) as found:
        pinned(folder)
    (fault,) = found.value.faults
    return fault


def test_an_adapter_stands_for_its_base_with_both_in_its_version(changed: Change, llama: str) -> None:
    folder = changed()
    model, base = pinned(folder), pin(ModelSpec(name=llama))
    assert (model.folder, model.adapter, model.name) == (base.folder, str(folder), str(folder))
    assert model.fetch() == model
    assert model.version not in (base.version, pinned(changed(lora_alpha=5)).version)
    assert model.version == pinned(changed()).version


def test_a_base_of_the_hub_is_fetched_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(name: str, revision: str, **_: Any) -> str:
        asked.append((name, revision))
        return "/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = Model(
        "/adapter", "/here", "both", hub=True, adapter="/adapter", base="org/base", base_commit="abc"
    )
    fetched = model.fetch()
    assert asked == [("org/base", "abc")]
    assert (fetched.folder, fetched.adapter) == ("/snapshot", "/adapter")


def test_an_adapter_is_refused_where_an_engine_runs_none(changed: Change) -> None:
    with pytest.raises(SpecError, match=r"is an adapter .*merge_and_unload"):
        pin(ModelSpec(name=str(changed())))


def test_the_adapter_has_its_own_tokenizer(saved: Path, changed: Change, llama: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = changed()
    assert pinned(folder).tokenizer_folder == pinned(folder).folder
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }} of the adapter"
    tokenizer.save_pretrained(folder)
    assert pinned(folder).tokenizer_folder == str(folder)
    spec = JobSpec.build(
        {"task": "text-generation", "model": str(folder), "input": "in", "output": "out",
         "engine": {"name": "vllm", "python": "/env/python"}}
    )  # fmt: skip
    config = RunnerConfig.of(spec, pinned(folder))
    read = RunnerConfig.from_json(config.to_json()).build_task().tokenizer
    chat = [{"role": "user", "content": "words"}]
    assert read.apply_chat_template(chat, tokenize=False) == "words of the adapter"


def test_files_of_an_adapter_that_cannot_be_read_are_named_with_what_to_do(
    changed: Change, tmp_path: Path
) -> None:
    for base in (None, "", 5, ...):
        assert "base_model_name_or_path" in fault_of(changed(base_model_name_or_path=base))
    said = fault_of(changed(base_model_name_or_path=str(tmp_path / "nowhere")))
    assert f"is an adapter of '{tmp_path}/nowhere'" in said
    assert "no folder" in said
    folder = changed()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert "cannot be read" in fault_of(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 438000000\n")
    assert "git lfs pull" in fault_of(folder)
    weights.rename(folder / "adapter_model.bin")
    assert "pickle" in fault_of(folder)
    (folder / "adapter_model.bin").unlink()
    assert "expected adapter_model.safetensors" in fault_of(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not JSON" in fault_of(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, 'peft_type="IA3"'),
        ({"peft_type": ...}, "no peft_type"),
        ({"r": 600}, "r=600"),
        ({"r": 0}, "r=0"),
        ({"r": ...}, "no r"),
        ({"use_dora": True}, "use_dora=true"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
        ({"bias": "all"}, 'bias="all"'),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern={"q_proj": 2}'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa"'),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3]"),
        ({"of_a_later_peft": {"a": list(range(99))}}, "of_a_later_peft="),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_with_its_value(
    changed: Change, settings: dict[str, Any], words: str
) -> None:
    (fault,) = plain_lora_faults("a/b", str(changed(**settings)), "vllm")
    assert f"model 'a/b': adapter_config.json has {words}" in fault
    assert "merge_and_unload" in fault
    assert len(fault) < 400


def test_all_that_is_not_plain_lora_is_named_together(changed: Change) -> None:
    (fault,) = plain_lora_faults("m", str(changed(use_dora=True, r=1000, lora_bias=True)), "vllm")
    assert "lora_bias=true, r=1000, use_dora=true, and engine vllm" in fault


def test_weights_that_are_no_matrices_of_lora_are_refused(changed: Change) -> None:
    folder = changed()
    ones = np.ones((2, 2), np.float32)
    kept = {f"{LAYER}.lora_A.weight": ones, f"{LAYER}.lora_B.weight": ones}
    save_file(kept, folder / "adapter_model.safetensors")
    assert plain_lora_faults("m", str(folder), "vllm") == []
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**kept, name: ones}, folder / "adapter_model.safetensors")
    (fault,) = plain_lora_faults("m", str(folder), "vllm")
    assert f"adapter_model.safetensors has {name}" in fault


def test_what_changes_no_texts_is_left_alone(changed: Change) -> None:
    harmless = {"init_lora_weights": "gaussian", "use_rslora": True, "lora_dropout": 0.1, "layers_to_transform": [0]}  # fmt: skip
    folder = changed(**harmless)
    assert plain_lora_faults("m", str(folder), "vllm") == []
    for rank, limit in ((1, 8), (8, 8), (9, 16), (257, 320), (512, 512)):
        assert rank_limit(str(changed(r=rank))) == limit


def test_an_adapter_on_the_hub_comes_with_the_way_to_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    info = SimpleNamespace(sha="abc", siblings=files)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    with pytest.raises(SpecError, match="hf download org/adapter --local-dir"):
        pin(ModelSpec(name="org/adapter"), adapters=True)
    with pytest.raises(SpecError, match="merge_and_unload"):
        pin(ModelSpec(name="org/adapter"))
