"""The `engine` section of a job's spec: what runs the model, in which form, and how that form is checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hfbatch.spec.section import Section
from hfbatch.spec.shorthand import shorthand

TorchQuantization = Literal[
    "none", "int8", "nf4", "fp4", "int8_weight_only", "int4_weight_only", "int8_dynamic"
]


class GuardSpec(Section):
    """The comparison of a lowered precision with float32, on rows of the job, before the first part is written."""

    mode: Literal["auto", "required", "off"] = "auto"
    """auto: compare where a float32 reference can be computed; required: refuse a job without one; off: do not compare."""
    rows: int = Field(default=256, ge=8)
    """Maximum number of rows to compare; fewer if they take longer than a twentieth of the job."""
    limits: dict[str, float] = Field(default={})
    """Limits in place of the task's own, such as {cosine_mean: 0.99}; `hfbatch docs engines` lists them."""


class _EngineSpec(Section):
    """What every engine has."""

    guard: Annotated[GuardSpec, shorthand("mode")] = GuardSpec()
    """How a lowered precision is compared with float32; a plain string is its mode."""


class TorchEngineSpec(_EngineSpec):
    """PyTorch: padded batches of rows, for every task."""

    name: Literal["torch"]
    """Name of the engine."""
    quantization: TorchQuantization = "none"
    """Precision of the weights; int8 (LLM.int8), nf4 and fp4 by bitsandbytes, the others by torchao. They save memory; on CPUs, no
    time."""


class ContinuousEngineSpec(_EngineSpec):
    """Continuous batching, for text-generation: the next row starts as soon as another one ends.

    `batch.size` is then the number of concurrent rows, and `batch.tokens` the maximum of tokens in a step.
    """

    name: Literal["continuous"]
    """Name of the engine."""
    quantization: TorchQuantization = "none"
    """Precision of the weights, as for torch."""


class OpenVINOEngineSpec(_EngineSpec):
    """OpenVINO: a graph exported from the model, for tasks that read nothing but its outputs."""

    name: Literal["openvino"]
    """Name of the engine."""
    quantization: Literal["none", "int8"] = "none"
    """int8: weights as 8-bit integers for each channel, by NNCF; activations of linear layers quantised in groups of 128."""


class OnnxEngineSpec(_EngineSpec):
    """ONNX Runtime: a graph exported from the model, for tasks that read nothing but its outputs."""

    name: Literal["onnx"]
    """Name of the engine."""
    quantization: Literal["none", "int8"] = "none"
    """int8: weights of linear layers as 8-bit integers for each channel, activations quantised for each batch."""


EngineSpec = Annotated[
    TorchEngineSpec | ContinuousEngineSpec | OpenVINOEngineSpec | OnnxEngineSpec,
    Field(discriminator="name"),
    shorthand("name"),
]
"""The engine of a job. The type of the section follows from `name`."""
