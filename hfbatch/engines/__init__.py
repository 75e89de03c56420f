"""Inference engines: each loads a model and answers what tasks ask of it.

A new engine is one new file with a subclass of `BatchEngine` or `RowEngine`, its kind in ENGINES, and its section in the
spec (`hfbatch/spec/engines.py`, EngineSpec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from hfbatch.engines.base import REMOTE, Capability


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
    exports: bool = False
    """Whether it runs a graph that is exported from the model."""
    apart: str = ""
    """What it runs in instead of this Python environment, and which field of the spec names that."""
    local: bool = True
    """Whether it loads the model's files, into memory of the worker."""
    compiles: bool = False
    """Whether torch.compile can compile the model for it."""
    adapters: bool = False
    """Whether it runs an adapter beside its base model, as it is."""
    quantizations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What the weights can be quantised to, and the packages that it needs besides."""

    def needs(self, quantization: str = "none") -> tuple[str, ...]:
        """Returns the packages whose versions may change results, besides torch and transformers."""
        return (*self.packages, *self.quantizations.get(quantization, ()))

    def missing(self, quantization: str = "none") -> list[str]:
        """Returns the packages that are not installed."""
        return [name for name in self.needs(quantization) if find_spec(name) is None]

    def load(self) -> Any:
        """Imports the class."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)


TORCH_QUANTIZATIONS = {
    "int8": ("bitsandbytes",),
    "nf4": ("bitsandbytes",),
    "fp4": ("bitsandbytes",),
    "int8_weight_only": ("torchao",),
    "int8_dynamic": ("torchao",),
}
ENGINES = {
    "torch": EngineKind(
        "hfbatch.engines.torch:TorchEngine",
        frozenset(Capability) - {Capability.ANSWER},
        compiles=True,
        quantizations=TORCH_QUANTIZATIONS,
    ),
    "continuous": EngineKind(
        "hfbatch.engines.continuous:ContinuousEngine",
        frozenset({Capability.COMPLETE, Capability.CONSTRAINED}),
        rows=True,
        quantizations=TORCH_QUANTIZATIONS,
    ),
    "openvino": EngineKind(
        "hfbatch.engines.openvino:OpenVINOEngine",
        frozenset({Capability.FORWARD}),
        dtypes=("float32", "bfloat16"),
        packages=("openvino",),
        gpus=False,
        exports=True,
        quantizations={"int8": ("nncf",)},
    ),
    "onnx": EngineKind(
        "hfbatch.engines.onnx:OnnxEngine",
        frozenset({Capability.FORWARD}),
        dtypes=("float32",),
        packages=("onnxruntime", "onnxscript"),
        gpus=False,
        exports=True,
        quantizations={"int8": ("onnx",)},
    ),
    "vllm": EngineKind(
        "hfbatch.engines.vllm:VLLMEngine",
        frozenset({Capability.COMPLETE, Capability.CONSTRAINED}),
        rows=True,
        apart="a Python environment with vLLM (engine.python)",
        adapters=True,
    ),
    "http": EngineKind(
        "hfbatch.engines.http:HttpEngine",
        frozenset({Capability.ANSWER}),
        rows=True,
        dtypes=(REMOTE,),
        gpus=False,
        apart="an endpoint (engine.url)",
        local=False,
    ),
}
"""Engines by the name that the spec gives."""


def kind_of(name: str) -> EngineKind:
    """Returns the kind of the engine that a job begins with: that of its name, or for `auto` torch, which runs every task."""
    return ENGINES["torch" if name == "auto" else name]
