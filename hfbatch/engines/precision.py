"""Selects the dtype that the available device supports natively."""

from __future__ import annotations


def native_dtype(gpus: bool = True) -> tuple[str, str]:
    """Returns the device ("cuda" or "cpu") and the best dtype that it supports natively ("bfloat16" or "float32").

    :param gpus: whether a GPU may be the device.

    bfloat16 on GPUs since Ampere (compute capability 8.0) and on CPUs with AVX512-BF16 or AMX; it has the
    range of float32, so that no model overflows, unlike with float16.
    """
    import torch

    if gpus and torch.cuda.is_available():
        return "cuda", "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    able = torch.cpu.get_capabilities()
    return "cpu", "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get(
        "bf16"
    ) else "float32"
