"""Selects the dtype in which the available device computes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GAIN = 1.2
"""How much faster than float32 a CPU has to multiply in bfloat16, for its rounding to be worth it."""
SIZES = 512, 384, 384
"""Rows, inputs and outputs of the product that is timed: a layer of a small encoder."""
TRIES = 5


def native_dtype(gpus: bool = True) -> tuple[str, str]:
    """Returns the device ("cuda" or "cpu") and the best dtype that it supports natively ("bfloat16" or "float32").

    bfloat16 on GPUs since Ampere (compute capability 8.0) and on CPUs with AVX512-BF16 or AMX; it has the
    range of float32, so that no model overflows, unlike with float16.

    :param gpus: whether a GPU may be the device.
    """
    import torch

    if gpus and torch.cuda.is_available():
        return "cuda", "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    able = torch.cpu.get_capabilities()
    return "cpu", "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get(
        "bf16"
    ) else "float32"


def fastest_dtype(gpus: bool = True) -> str:
    """Returns the native dtype, or float32 on a CPU that is hardly faster in it.

    Intel's CPUs without AMX, or with AMX switched off by a virtual machine, multiply in bfloat16 at 0.6 times the speed of
    float32, although they have instructions for it.
    """
    import torch

    device, dtype = native_dtype(gpus)
    if device == "cuda" or dtype == "float32" or torch.cpu.get_capabilities().get("amx_bf16"):
        return dtype
    return dtype if _seconds(torch.float32) > GAIN * _seconds(torch.bfloat16) else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """Returns the shortest time of a linear layer."""
    import torch

    rows, width, outputs = SIZES
    layer, inputs = torch.nn.Linear(width, outputs, dtype=dtype), torch.zeros(rows, width, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(TRIES + 1):  # the first one prepares the product
            begun = time.perf_counter()
            layer(inputs)
            times.append(time.perf_counter() - begun)
    return min(times[1:])
