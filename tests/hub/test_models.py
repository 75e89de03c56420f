"""Model folders: what is wrong with files and weights is found before work, and nothing that they name is fetched or run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from hfbatch.errors import SpecError
from hfbatch.hub.models import Model, pin
from hfbatch.hub.weights import index_faults
from hfbatch.spec.job import ModelSpec

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 438000000\n"
CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32}
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def tensors(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones((2, 3), np.float32) for name in names}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A model of one weights file."""
    folder = tmp_path / "whole"
    write(folder, "config.json", CONFIG)
    save_file(tensors("a", "b"), folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two weights files and their index."""
    folder = tmp_path / "sharded"
    write(folder, "config.json", CONFIG)
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file(tensors(name), folder / shard)
    write(folder, "model.safetensors.index.json", {"weight_map": dict(zip("ab", SHARDS, strict=True))})
    return folder


def faults_of(folder: Path, **options: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        pin(ModelSpec(name=str(folder), **options))
    return caught.value.faults


def the_fault(folder: Path, *parts: str) -> None:
    """One fault, in one sentence, with these parts and the model's name."""
    (fault,) = faults_of(folder)
    assert all(part in fault for part in (str(folder), *parts)), fault
    assert "\n" not in fault


def test_a_folder_of_one_file_or_of_several_is_read_by_its_headers(whole: Path, sharded: Path) -> None:
    for folder in (whole, sharded):
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert pin(ModelSpec(name=str(folder))).size() == (12, stored)


def test_a_pointer_of_git_lfs_is_no_weights(whole: Path, sharded: Path) -> None:
    write(whole, "model.safetensors", POINTER)
    the_fault(whole, "model.safetensors", "Git LFS", "git lfs pull")
    for shard in SHARDS:
        write(sharded, shard, POINTER)
    assert len(faults_of(sharded)) == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt", "tokenizer.model", "1_Pooling/config.json"])  # fmt: skip
def test_a_pointer_of_git_lfs_is_no_other_file_either(whole: Path, name: str) -> None:
    write(whole, name, POINTER)
    the_fault(whole, name, "Git LFS")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), junk=st.binary(max_size=16))
def test_damaged_weights_are_reported_by_their_header(whole: Path, cut: int, junk: bytes) -> None:
    good = save(tensors("a", "b", "c"))
    bad = good[: min(cut, len(good) - 1)] + junk
    bad += b"\0" * (len(bad) == len(good))
    (whole / "model.safetensors").write_bytes(bad)
    the_fault(whole, f"model.safetensors ({len(bad):,} bytes)", "download it again")


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"nope", (2).to_bytes(8, "little") + b"[]"],
)  # fmt: skip
def test_a_header_of_anything_else_is_reported(whole: Path, header: bytes) -> None:
    (whole / "model.safetensors").write_bytes(header + b"\0" * 64)
    the_fault(whole, "not a complete safetensors file")


def test_a_missing_shard_is_reported(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    the_fault(sharded, SHARDS[1], "missing")


def test_a_shard_that_the_index_leaves_out_is_reported(sharded: Path) -> None:
    write(sharded, "model.safetensors.index.json", {"weight_map": {"a": SHARDS[0]}})
    the_fault(sharded, SHARDS[1], "does not name")


def test_a_tensor_that_a_shard_lacks_is_reported(sharded: Path) -> None:
    save_file(tensors("z"), sharded / SHARDS[1])
    the_fault(sharded, SHARDS[1], "'b'")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}])
def test_an_index_without_a_map_is_reported(sharded: Path, weight_map: Any) -> None:
    write(sharded, "model.safetensors.index.json", {"weight_map": weight_map})
    the_fault(sharded, "weight_map")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "..", "a\\b.safetensors"])  # fmt: skip
def test_an_index_names_weights_of_its_own_folder_alone(sharded: Path, name: str) -> None:
    """A pickle among them would be opened, and is not part of the identity; nor is what is elsewhere."""
    write(sharded, "model.safetensors.index.json", {"weight_map": {"a": SHARDS[0], "b": name}})
    the_fault(sharded, repr(name), "same folder")


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.bin", 3])
def test_a_config_names_weights_of_its_own_folder_alone(whole: Path, name: Any) -> None:
    write(whole, "config.json", {**CONFIG, "transformers_weights": name})
    the_fault(whole, repr(name), "same folder")


def test_weights_under_a_name_that_nobody_looks_for_are_reported(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "weights.safetensors")
    the_fault(whole, "weights.safetensors", "model.safetensors")
    write(whole, "config.json", {**CONFIG, "transformers_weights": "weights.safetensors"})
    assert pin(ModelSpec(name=str(whole))).size()[0] == 12


def test_every_shard_is_part_of_the_identity(sharded: Path) -> None:
    before = pin(ModelSpec(name=str(sharded))).commit
    save_file({"b": np.zeros((2, 3), np.float32)}, sharded / SHARDS[1])
    after = pin(ModelSpec(name=str(sharded))).commit
    assert before != after


def test_links_as_in_the_cache_of_the_hub_are_followed(sharded: Path, tmp_path: Path) -> None:
    """Those to a folder too, whose files are read; not those that lead upwards."""
    snapshot = tmp_path / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    write(tmp_path / "modules", "config.json", {"pooling_mode": "cls"})
    (snapshot / "1_Pooling").symlink_to(tmp_path / "modules")
    (snapshot / "up").symlink_to(tmp_path)
    model = pin(ModelSpec(name=str(snapshot)))
    assert model.size()[0] == 12
    write(tmp_path / "modules", "config.json", {"pooling_mode": "max"})
    write(tmp_path, "other.txt", "not the model's")
    changed = pin(ModelSpec(name=str(snapshot))).commit
    assert changed != model.commit
    write(tmp_path, "other.txt", "nor this")
    assert pin(ModelSpec(name=str(snapshot))).commit == changed
    (sharded / SHARDS[0]).unlink()
    the_fault(snapshot, SHARDS[0], "missing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"])  # fmt: skip
@pytest.mark.parametrize("content", ['{"a": ', "[1, 2]", "", "\x00\x01", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_reported(whole: Path, name: str, content: str) -> None:
    write(whole, name, content)
    the_fault(whole, name)


@pytest.mark.parametrize(
    "modules", [{}, [1], [{"path": ""}], [{"type": 3}], [{"type": "a.B", "path": "../x"}]]
)
def test_modules_that_are_none_are_reported(whole: Path, modules: Any) -> None:
    write(whole, "modules.json", modules)
    the_fault(whole, "modules.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**9), ("hidden_size", 10**15), ("hidden_size", 0), ("vocab_size", 1e300),
     ("num_attention_heads", -4)],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_sizes_that_no_model_has_are_reported(whole: Path, name: str, value: float, nested: bool) -> None:
    given = {"text_config": {name: value}} if nested else {name: value}
    write(whole, "config.json", {**CONFIG, **given})
    the_fault(whole, name, repr(value))


@pytest.mark.parametrize(
    ("method", "package"),
    [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("torchao", "torchao"),
     ("hqq", "hqq"), ("quanto", "optimum-quanto"), ("aqlm", "aqlm"), ("vptq", "vptq"), ("eetq", "Hub"),
     ("my-own", "transformers does not load")],
)  # fmt: skip
def test_weights_whose_library_is_missing_are_reported(
    whole: Path, method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfbatch.hub.modelfiles.find_spec", lambda name: None)
    write(whole, "config.json", {**CONFIG, "text_config": {"quantization_config": {"quant_method": method}}})
    the_fault(whole, method, package)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit, both true"),
        ({"load_in_8bit": "true"}, "load_in_8bit 'true', which is neither true nor false"),
        (
            {"quant_method": "gptq", "load_in_4bit": True},
            "'gptq' and load_in_4bit true, which is of bitsandbytes",
        ),
        ({"quant_method": "bitsandbytes"}, "neither load_in_8bit nor load_in_4bit true"),
        ({}, "neither load_in_8bit nor load_in_4bit true"),
        ({"quant_method": ["awq"]}, "quant_method ['awq'], which is no name"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type 'int4', which is neither",
        ),
        (["int8"], "quantization_config with ['int8'] in place of an object"),
    ],
)
def test_settings_of_quantised_weights_that_contradict_each_other_are_faults(
    whole: Path, given: Any, part: str
) -> None:
    write(whole, "config.json", {**CONFIG, "quantization_config": given})
    the_fault(whole, part, "download the file again, or give the model without quantisation")


def test_weights_whose_library_is_there_pass(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(whole, "config.json", {**CONFIG, "quantization_config": {"load_in_4bit": True}})
    pin(ModelSpec(name=str(whole)))
    monkeypatch.setattr("hfbatch.hub.modelfiles.find_spec", lambda name: None)
    the_fault(whole, "bitsandbytes", "pip install")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    write(folder, "adapter_config.json", {"base_model_name_or_path": "org/base"})


def adapter_beside(folder: Path) -> None:
    write(folder, "adapter_config.json", {"base_model_name_or_path": "org/base"})


def old_sentence_transformer(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    (folder / "config.json").rename(folder / "0_Transformer" / "config.json")
    write(
        folder,
        "modules.json",
        [{"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}],
    )


def old_beside_a_config(folder: Path) -> None:
    write(folder, "modules.json", [{"type": "sentence_transformers.models.Transformer", "path": "0_BERT"}])


@pytest.mark.parametrize(
    ("change", "parts"),
    [(adapter, ("adapter", "'org/base'", "merge_and_unload")), (adapter_beside, ("adapter", "merge_and_unload")),
     (old_sentence_transformer, ("0_Transformer", "SentenceTransformer(")), (old_beside_a_config, ("0_BERT", ".save("))],
)  # fmt: skip
def test_other_layouts_come_with_the_way_to_convert_them(
    whole: Path, change: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    change(whole)
    the_fault(whole, *parts)


@pytest.mark.parametrize(
    "given",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "evil/kernel@main:run"},
        {"attn_implementation": {"": "sdpa", "vision_config": "paged|evil/kernel"}},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"backbone": "hf-hub:evil/backbone"},
        {"architecture": "local-dir:/tmp/evil"},
        {"model_args": {"checkpoint_path": "evil.pth"}},
        {"model_args": {"pretrained": True}},
    ],
)
def test_code_and_weights_from_elsewhere_are_refused(whole: Path, given: dict[str, Any]) -> None:
    write(whole, "config.json", {**CONFIG, **given})
    the_fault(whole, next(iter(given)), "config.json")
    write(
        whole, "config.json", {**CONFIG, "attn_implementation": "sdpa", "model_args": {"pretrained": False}}
    )
    pin(ModelSpec(name=str(whole)))


def test_another_model_in_a_processor_is_refused(whole: Path) -> None:
    given = {"audio_tokenizer_name_or_path": "evil/codec", "audio_tokenizer_class": "DacModel"}
    write(whole, "processor_config.json", {"audio_tokenizer": given})
    the_fault(whole, "processor_config.json", "'evil/codec'")


def test_the_files_of_a_training_and_of_other_frameworks_are_nobodys_concern(whole: Path) -> None:
    for name in ("trainer_state.json", "training_args.bin", "pytorch_model.bin", "consolidated.safetensors"):
        write(whole, name, POINTER if name.endswith((".bin", "tensors")) else "no JSON")
    assert pin(ModelSpec(name=str(whole))).size()[0] == 12


@pytest.mark.parametrize(("switch", "found"), [(None, "None"), ("NO", "None"), ("YES", "ModuleSpec")])
def test_no_kernels_come_from_the_hub_unasked(tmp_path: Path, switch: str | None, found: str) -> None:
    """Some models fetch and run kernels at their import wherever the package is installed."""
    write(tmp_path, "kernels.py", "")
    environment = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    environment |= {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"} | (
        {"USE_HUB_KERNELS": switch} if switch else {}
    )
    code = "import hfbatch, importlib.util, os; print(importlib.util.find_spec('kernels'), os.environ['USE_HUB_KERNELS'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(found)
    assert run.stdout.split()[-1] == (switch or "NO")


def test_size_is_nothing_where_no_weights_are(tmp_path: Path) -> None:
    write(tmp_path, "config.json", CONFIG)
    assert Model("m", str(tmp_path), "0").size() == (0, 0)


def test_the_weights_of_a_model_on_the_hub_are_checked_by_their_names(sharded: Path) -> None:
    """Before they are fetched, which only workers do."""
    for shard in SHARDS:
        (sharded / shard).unlink()
    assert index_faults("org/m", sharded, [*SHARDS, "model.safetensors.index.json"]) == []
    (fault,) = index_faults("org/m", sharded, [SHARDS[0], "model.safetensors.index.json"])
    assert "'org/m'" in fault
    assert SHARDS[1] in fault
