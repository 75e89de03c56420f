"""In which engine and precision a model runs: what a spec leaves open, what can be tried, and what has a reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hfbatch.engines import ENGINES
from hfbatch.engines.precision import fastest_dtype, native_dtype
from hfbatch.runtime.machine import free_memory
from hfbatch.tasks.base import Task

FLOAT32_BYTES = 4
ROOM = 1.5
"""Memory that a model needs besides, as a multiple of its weights: activations, and a copy of a layer while it loads."""


@dataclass(frozen=True)
class Variant:
    """An engine, and the precision in which it runs the model."""

    engine: str
    dtype: str
    quantization: str = "none"
    compiled: bool = False
    """Whether torch.compile compiles the model."""

    @property
    def lowered(self) -> bool:
        """Whether results may differ from those in float32 by more than rounding."""
        return self.dtype != "float32" or self.quantization != "none"

    def __str__(self) -> str:
        weights = "" if self.quantization == "none" else f"{self.quantization}, "
        return f"{self.engine} ({'compiled, ' if self.compiled else ''}{weights}{self.dtype})"


REFERENCE = Variant("torch", "float32")


def candidates(task: Task, dtype: str, gpus: bool) -> Iterator[Variant]:
    """Yields the variants that `engine: auto` may choose here: what is installed and can run the task, lowest precision last.

    Quantised weights save memory rather than time in PyTorch, so that only other engines are tried with them.

    :param dtype: of the spec; `auto`: float32 and what the device is fastest in.
    :param gpus: whether the worker has a GPU.
    """
    device, _ = native_dtype(gpus)
    dtypes = list(dict.fromkeys(("float32", fastest_dtype(gpus)))) if dtype == "auto" else [dtype]
    for name, kind in ENGINES.items():
        if (
            kind.rows
            or kind.missing()
            or not task.asks <= kind.answers
            or (device == "cuda" and not kind.gpus)
        ):
            continue
        able = [one for one in dtypes if one in kind.dtypes]
        yield from (Variant(name, one) for one in able)
        if name != "torch" and dtype == "auto":
            yield from (Variant(name, "float32", one) for one in kind.quantizations if not kind.missing(one))


def is_quantised(task: Task) -> bool:
    """Returns whether the weights of the model are quantised already."""
    return bool(getattr(task.config, "quantization_config", None))


def no_reference(task: Task) -> str:
    """Returns why the model has no float32 reference on this machine; empty if it has one."""
    if task.agreement is None:
        return f"task {task.name} has no measure of agreement"
    if task.model.graphs:
        return "the model is a graph; there are no weights to compare it with"
    if is_quantised(task):
        return "its weights are quantised already"
    parameters, _ = task.model.size()
    needed, free = parameters * FLOAT32_BYTES * ROOM, free_memory()
    if not parameters and Path(task.model.folder).is_dir():
        return "its weights do not state their sizes"
    if needed > free:
        return f"in float32 it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return ""
