"""The `engine` section of a job's spec: what runs the model, in which form, and how that form is checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfbatch.spec.section import Auto, Section
from hfbatch.spec.shorthand import shorthand

TorchQuantization = Literal["none", "int8", "nf4", "fp4", "int8_weight_only", "int8_dynamic"]


class GuardSpec(Section):
    """The comparison of a lowered precision with float32, on rows of the job, before the first part is written."""

    mode: Literal["auto", "required", "skip"] = "auto"
    """auto: compare where a float32 reference can be computed; required: refuse a job without one; skip: do not compare."""
    rows: int = Field(default=256, ge=8)
    """Maximum number of rows to compare; fewer if they take longer than a twentieth of the job."""
    limits: dict[str, float] = Field(default={})
    """Limits in place of the task's own, such as {cosine_mean: 0.99}; `hfbatch docs engines` lists them."""


class _EngineSpec(Section):
    """What every engine has."""

    threads: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Cores that a worker's model uses; auto: the worker's share of the cores of its machine."""
    guard: Annotated[GuardSpec, shorthand("mode")] = GuardSpec()
    """How a lowered precision is compared with float32; a plain string is its mode."""


class TorchEngineSpec(_EngineSpec):
    """PyTorch: batches of rows, padded or packed, for every task."""

    name: Literal["torch"]
    """Name of the engine."""
    quantization: TorchQuantization = "none"
    """Precision of the weights; int8 (LLM.int8), nf4 and fp4 by bitsandbytes, the others by torchao. They save memory; on CPUs, no
    time."""
    compile: bool | Auto = "auto"
    """Whether torch.compile compiles the model, for tasks that read nothing but its outputs; auto: no. It takes from half a minute
    to minutes, once on each machine."""
    packing: bool | Auto = "auto"
    """Whether the rows of a batch run one behind the other as one sequence, without padding; for models of text whose attention
    can be kept within a row, such as BERT, RoBERTa, ModernBERT and Qwen3. auto: in endpoints on CPUs, where the model can be packed;
    not in jobs, whose sorted rows have little padding."""
    device_map: Auto | None = None
    """auto: for a model larger than a device, spread its layers over the GPUs of a worker, its memory and its disk."""
    memory: dict[
        Annotated[str, Field(pattern=r"^(cpu|\d+)$")], Annotated[str, Field(pattern=r"^\d+[KMGT]i?B$")]
    ] = Field(default={})
    """Maximum for the weights on each device with device_map, such as {"0": 40GB, cpu: 100GB}; default: what is free."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.memory and self.device_map is None:
            raise ValueError(
                "memory limits the devices of device_map; add device_map: auto, or leave memory out"
            )
        if self.device_map and self.quantization != "none":
            raise ValueError("device_map cannot spread weights that are quantised; leave one of them out")
        if self.compile is True and (self.device_map or self.quantization != "none"):
            raise ValueError(
                "compile is for a model on one device, with weights that are not quantised; leave one of them out"
            )
        if self.packing is True and (self.device_map or self.compile is True):
            raise ValueError(
                "packing is for a model on one device that is not compiled; leave one of them out"
            )
        return self


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


SET_HERE = frozenset(
    (
        *(
            "model",
            "served_model_name",
            "host",
            "port",
            "api_key",
            "dtype",
            "generation_config",
            "trust_remote_code",
        ),
        *("tokenizer", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "config"),
        *("enable_lora", "lora_modules", "max_lora_rank"),
    )
)
"""Options of vLLM's server that a spec sets elsewhere, or not at all."""


class VLLMEngineSpec(_EngineSpec):
    """vLLM, for text-generation: its server runs beside each worker, in a Python environment that has vLLM.

    `batch.size` is then the number of concurrent rows.
    """

    name: Literal["vllm"]
    """Name of the engine."""
    python: str
    """Path of the Python interpreter of that environment, on every node, such as /opt/vllm/bin/python."""
    arguments: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Any] = Field(default={})
    """Options of the server, such as {max_model_len: 4096, tensor_parallel_size: 2}, which becomes --max-model-len 4096."""
    timeout: float = Field(default=600, gt=0, allow_inf_nan=False)
    """Seconds without any answer after which the server is restarted."""
    start_timeout: float = Field(default=900, gt=0, allow_inf_nan=False)
    """Seconds that the start of the server may take."""

    @property
    def quantization(self) -> str:
        """What the engine quantises itself; vLLM loads quantised checkpoints as they are."""
        return "none"

    @field_validator("python")
    @classmethod
    def _is_absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError("must be an absolute path, such as /opt/vllm/bin/python")
        return path

    @field_validator("arguments")
    @classmethod
    def _are_left(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(SET_HERE & {*given}):
            raise ValueError(
                f"must not set {', '.join(taken)}, which other fields of the spec set, or nothing does"
            )
        return given


class Prices(Section):
    """What the tokens of an endpoint cost, in any currency, for each million."""

    input: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Of tokens of prompts."""
    output: float = Field(default=0, ge=0, allow_inf_nan=False)
    """Of new tokens."""


class HttpEngineSpec(_EngineSpec):
    """An endpoint with the API of OpenAI, for text-generation and embedding: `model` is the name of a model that it serves.

    `batch.size` is then the number of concurrent requests.
    """

    name: Literal["http"]
    """Name of the engine."""
    url: str
    """URL of the API, such as http://localhost:8000/v1."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable with the bearer token, on every node."""
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Maximum rate of requests of a worker; null: no limit but that which the endpoint answers with."""
    texts_per_request: int = Field(default=16, ge=1)
    """Maximum number of texts in a request for embeddings."""
    timeout: float = Field(default=600, gt=0, allow_inf_nan=False)
    """Seconds that a request may take."""
    prices: Prices = Prices()
    """What tokens cost, for the report."""

    @property
    def quantization(self) -> str:
        """What this side knows of the weights."""
        return "none"

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        """The URL without /v1."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "must begin with http:// or https:// and a host, such as http://localhost:8000/v1"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query; name the token's variable in token_env")
        return url.rstrip("/").removesuffix("/v1").rstrip("/")


class AutoEngineSpec(_EngineSpec):
    """The fastest installed engine and precision whose results agree with float32 on rows of the job.

    Jobs of less than some two minutes run on torch in the native dtype.
    """

    name: Literal["auto"]
    """Name of the engine."""
    seconds: float = Field(default=20, gt=0)
    """Maximum of seconds for the trials, and at most a twentieth of the estimated job; if a fiftieth of it is more, that."""

    @property
    def quantization(self) -> str:
        """What the job begins with."""
        return "none"

    @model_validator(mode="after")
    def _is_compared(self) -> Self:
        if self.guard.mode == "skip":
            raise ValueError(
                "auto chooses by the comparison with float32; leave guard: skip out, or name an engine"
            )
        return self


def _torch_by_default(value: Any) -> Any:
    return {"name": "torch", **value} if isinstance(value, dict) and "name" not in value else value


EngineSpec = Annotated[
    TorchEngineSpec
    | ContinuousEngineSpec
    | OpenVINOEngineSpec
    | OnnxEngineSpec
    | VLLMEngineSpec
    | HttpEngineSpec
    | AutoEngineSpec,
    Field(discriminator="name"),
    shorthand("name"),
    BeforeValidator(_torch_by_default),
]
"""The engine of a job. The type of the section follows from `name`, which is torch if it is left out."""
