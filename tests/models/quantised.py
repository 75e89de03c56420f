"""Checkpoints whose weights are quantised already, of a model that has its own in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchao.quantization as ao
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

BLOCK = 32


def quantised_checkpoint(kind: str, original: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Writes the checkpoint of a decoder. :param kind: one of KINDS. :returns: its folder."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    KINDS[kind](original, folder, dtype)
    return str(folder)


def _by_config(config: Callable[[], Any]) -> Callable[[str, Path, torch.dtype], None]:
    def write(original: str, folder: Path, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(original, dtype=dtype, quantization_config=config())
        model.save_pretrained(folder)

    return write


def _compressed(scheme: str, form: str) -> Callable[[str, Path, torch.dtype], None]:
    """Rounds to the nearest value, with the scales of compressed-tensors."""

    def write(original: str, folder: Path, dtype: torch.dtype) -> None:
        model = AutoModelForCausalLM.from_pretrained(original, dtype=dtype).eval()
        group = preset_name_to_scheme(scheme, ["Linear"])
        group.format = form
        if group.weights.group_size:
            group.weights.group_size = BLOCK
        groups = {"group_0": group}
        apply_quantization_config(
            model,
            QuantizationConfig(
                config_groups=groups, ignore=["lm_head"], quantization_status="frozen", format=form
            ),
        )
        for layer in model.modules():
            if hasattr(layer, "weight_scale"):
                blocks = layer.weight.data.reshape(
                    len(layer.weight), -1, group.weights.group_size or layer.in_features
                )
                scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), group.weights)
                layer.weight_scale.data.copy_(scale)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return write


def _fp8(original: str, folder: Path, dtype: torch.dtype) -> None:
    """8-bit floats with a scale for each block, as DeepSeek's."""
    found = {}
    for name, weight in load_file(Path(original, "model.safetensors")).items():
        if "proj" not in name:
            found[name] = weight.to(dtype)
            continue
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        found[name] = (blocks / scale).reshape(weight.shape).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale.reshape(rows, columns)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


KINDS: dict[str, Callable[[str, Path, torch.dtype], None]] = {
    "int8": _by_config(lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "nf4": _by_config(
        lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    ),
    "torchao": _by_config(lambda: TorchAoConfig(ao.Int8DynamicActivationInt8WeightConfig())),
    "W8A8": _compressed("W8A8", "int-quantized"),
    "W4A16": _compressed("W4A16", "pack-quantized"),
    "fp8": _fp8,
}
