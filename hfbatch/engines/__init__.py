"""Inference engines: each loads a model and answers what tasks ask of it.

A new engine is one new file with a subclass of `BatchEngine` or `RowEngine`, its kind in ENGINES, and its section in the
spec (`hfbatch/spec/job.py`, EngineSpec).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hfbatch.engines.base import Capability


@dataclass(frozen=True)
class EngineKind:
    """What is known of an engine before it is imported."""

    path: str
    """Module and class."""
    answers: frozenset[Capability]
    """What tasks may ask of it."""
    rows: bool = False
    """Whether it is a RowEngine."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """What it can compute in."""
    packages: tuple[str, ...] = ()
    """Packages that it needs besides torch and transformers, which the extra of its name installs. Their versions may change results."""
    gpus: bool = True
    """Whether it can use a GPU."""

    def missing(self) -> list[str]:
        """Returns the packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]

    def load(self) -> Any:
        """Imports the class."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)


ENGINES = {
    "torch": EngineKind("hfbatch.engines.torch:TorchEngine", frozenset(Capability)),
    "continuous": EngineKind(
        "hfbatch.engines.continuous:ContinuousEngine", frozenset({Capability.COMPLETE}), rows=True
    ),
    "openvino": EngineKind(
        "hfbatch.engines.openvino:OpenVINOEngine",
        frozenset({Capability.FORWARD}),
        dtypes=("float32", "bfloat16"),
        packages=("openvino",),
        gpus=False,
    ),
    "onnx": EngineKind(
        "hfbatch.engines.onnx:OnnxEngine",
        frozenset({Capability.FORWARD}),
        dtypes=("float32",),
        packages=("onnxruntime", "onnxscript"),
        gpus=False,
    ),
}
"""Engines by the name that the spec gives."""
