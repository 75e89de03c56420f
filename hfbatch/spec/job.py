"""The spec of a job, which users write as YAML, flags or Python. Validates its structure; reads no other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from hfbatch.errors import SpecError
from hfbatch.spec import plain_yaml
from hfbatch.spec.engines import EngineSpec, TorchEngineSpec
from hfbatch.spec.faults import faults_of
from hfbatch.spec.location import Location
from hfbatch.spec.section import Auto, Section
from hfbatch.spec.serve import EndpointSpec
from hfbatch.spec.shorthand import shorthand


class ModelSpec(Section):
    """Which model, at which revision and precision."""

    name: Location
    """A Hub name (org/model) or a folder with config.json and safetensors weights or an exported graph, or with GGUF files; for
    engine vllm, a folder with a LoRA adapter too."""
    file: str | None = None
    """The GGUF file to read config, tokenizer and weights from, where the model has GGUF files."""
    revision: str | None = None
    """A branch, tag or commit of the Hub; pinned to a commit before work starts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations; auto: bfloat16 if the device supports it natively and is faster in it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; read that code first."""


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[str, ...], BeforeValidator(_one_or_more, json_schema_input_type=tuple[str, ...] | str)
]
"""Several strings, or a single one."""


class FilesSpec(Section):
    """Which files the rows may refer to besides those below the input's folder, and how large these may be."""

    roots: Annotated[
        tuple[Location, ...],
        BeforeValidator(_one_or_more, json_schema_input_type=tuple[Location, ...] | Location),
    ] = ()
    """More folders and bucket prefixes with files that rows may refer to, such as [/data/images, s3://lake/images]."""
    hosts: Names = ()
    """Hosts of http(s) URLs that rows may refer to: names, *.names, addresses, networks; private addresses count by address."""
    schemes: Names = ()
    """Schemes of URLs that rows may refer to wherever they are: [https] for all public hosts, [s3] for all buckets."""
    max_bytes: int = Field(default=1 << 30, ge=1)
    """Maximum size in bytes of a file that a row refers to."""
    timeout: float = Field(default=60, gt=0, allow_inf_nan=False)
    """Seconds that a download may take, from the look-up of the host to the last byte."""
    max_pixels: int | None = Field(default=None, ge=1, le=178_956_970)
    """Maximum number of pixels of an image or a frame, and a quarter of the maximum of a video's frames together; null: 89,478,485."""
    max_seconds: float = Field(default=7200, gt=0, allow_inf_nan=False)
    """Longest recording; one of more than 96,000 samples a second, those of all channels, counts as longer."""

    @field_validator("schemes")
    @classmethod
    def _bare(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        bare = tuple(name.lower().removesuffix("://") for name in names)
        if {"file", "local"} & set(bare):
            raise ValueError("files of this machine are named by their folders; use roots")
        return bare

    @field_validator("hosts")
    @classmethod
    def _without_scheme(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if any("://" in name for name in names):
            raise ValueError("write hosts without http:// and without a path, such as images.example.com")
        return tuple(name.lower() for name in names)


class InputSpec(Section):
    """Where the rows are."""

    path: Location
    """A folder, file or glob: a local path, s3://, gs://, hf:// or another fsspec URL."""
    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    """File format; auto: by the endings of the file names."""
    columns: dict[str, str] = Field(default={})
    """Task input to dataset column, where the names differ, such as {text: body}."""
    types: dict[str, str | list[Any] | dict[str, Any]] = Field(default={})
    """Types of columns in JSONL, CSV and key=value folders, such as {zip: string}; others are inferred from a sample."""
    filter: str | None = None
    """A SQL condition; rows for which it is not true are left out, such as "lang = 'en'"."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first N rows of the input (counted before the filter)."""
    split_rows: int | None = Field(default=None, ge=1)
    """Maximum number of rows in a split, the unit of work and of commit; the default depends on the task."""
    files: FilesSpec = FilesSpec()
    """Images, audio and videos that rows name by path or URL; those below the input's folder are always read."""


class OutputSpec(Section):
    """Where the predictions go."""

    path: Location
    """The output folder: one Parquet part for each split."""
    keep: tuple[str, ...] | None = None
    """Input columns to copy beside the predictions; default: all of them."""
    prefix: str = ""
    """Put before the name of every output column of the task."""
    truncated: bool | str = False
    """Add a column of booleans, which rows were truncated; true names it `truncated`, a text is its name."""

    @property
    def truncated_column(self) -> str | None:
        """Name of the column that marks truncated rows; None if the spec does not ask for it."""
        return "truncated" if self.truncated is True else self.truncated or None


TEXTS = ("params.template",)
"""Fields whose overrides are taken as they are written, since they may look like YAML."""
Side = Literal["left", "right"] | None
SpecialToken = Literal[
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
]


class TokenizerSpec(Section):
    """Changes to the model's tokenizer. New tokens get new embeddings, which are untrained."""

    add_tokens: tuple[str, ...] = ()
    """Words that become one token each, such as [covid, mRNA]."""
    add_special_tokens: tuple[str, ...] = ()
    """Tokens to add that are never split or put into lower case, such as ["<row>"]."""
    special_tokens: dict[SpecialToken, str] = Field(default={})
    """Special tokens by role, such as {pad_token: "<pad>"}; added if the vocabulary lacks them."""
    truncation_side: Side = None
    """Side on which long rows are truncated; null: decided by the task and the tokenizer's files."""
    padding_side: Side = None
    """Side of the padding, for models that pad every row to a fixed length; null: as for truncation."""


class BatchSpec(Section):
    """Batches of rows."""

    size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Rows in a batch; auto tries a few sizes on real rows and keeps the fastest that fits, or takes the smallest, 16 on CPUs and
    32 on GPUs, if the job is too short to repay the trials."""
    max_length: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a row; longer ones are truncated and counted. Default: the model's own limit."""
    tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a batch with its padding, in addition to size. Default: if size is auto, 4096 for texts that a
    CPU encodes; else no limit."""
    dedupe: bool = True
    """Run rows of a split with identical features once; rows that are sampled have seeds of their own and are never identical."""
    share_prefixes: bool = True
    """For text-generation in torch: run the tokens that all prompts of a batch begin with, such as a system prompt, once."""
    continuous: bool | None = None
    """The same as `engine: continuous` if true; kept for older specs."""


class WorkersSpec(Section):
    """Number of model workers, and the resources of each."""

    count: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Number of workers with the model; auto: as many as fit into the cluster."""
    gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of one worker; auto: 1 if the cluster has GPUs, else 0."""
    cpus: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs of one worker."""


class RejectsSpec(Section):
    """How many rows may fail."""

    max_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest share of rejected rows with which a job still succeeds."""


class Spec(Section):
    """Base class of complete specs: reads YAML, validates, reports every fault, writes YAML."""

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Validates a nested mapping. :raises SpecError: with every fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(faults_of(error, cls)) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML spec and applies `dotted.key=value` overrides.

        :raises SpecError: with every fault.
        """
        return cls.build(apply_overrides(read_yaml(path), overrides))

    def to_yaml(self, secrets: bool = False) -> str:
        """Returns the spec as YAML, without fields that have their default value.

        :param secrets: whether URLs keep their secrets, without which the spec may not run.
        """
        values = self.model_dump(mode="json", exclude_defaults=True, context={"secrets": secrets})
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


class JobSpec(Spec):
    """The complete spec of a batch job."""

    task: str = Field(min_length=1)
    """Task to run on each row; `hfbatch tasks` lists the choices, auto: decided by the model's files."""
    model: Annotated[ModelSpec, shorthand("name")]
    """The model; a plain string is its name."""
    input: Annotated[InputSpec, shorthand("path")]
    """The rows; a plain string is the path."""
    output: Annotated[OutputSpec, shorthand("path")]
    """The predictions; a plain string is the path."""
    engine: EngineSpec = TorchEngineSpec(name="torch")
    """What runs the model; a plain string is its name."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """Changes to the model's tokenizer."""
    batch: BatchSpec = BatchSpec()
    """How rows are batched."""
    workers: WorkersSpec = WorkersSpec()
    """How the work is distributed."""
    params: dict[str, Any] = Field(default={})
    """Options of the task; `hfbatch tasks NAME` lists them."""
    rejects: RejectsSpec = RejectsSpec()
    """How many rows may fail."""
    seed: int = Field(default=0, ge=0)
    """Random seed."""
    serve: EndpointSpec = EndpointSpec()
    """Where and how an endpoint answers requests, see `hfbatch docs serving`; jobs do not read it."""

    @model_validator(mode="before")
    @classmethod
    def _continuous_is_an_engine(cls, values: Any) -> Any:
        """Sets the engine that `batch.continuous: true` stands for, unless the spec names one."""
        if not isinstance(values, dict) or values.get("engine") is not None:
            return values
        try:
            batch = BatchSpec.model_validate(values.get("batch") or {})
        except ValidationError:
            return values  # its faults are reported with those of the other sections
        return {**values, "engine": "continuous"} if batch.continuous else values

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        asked, engine = self.batch.continuous, self.engine.name
        if asked is not None and asked != (engine == "continuous"):
            raise ValueError(
                f"batch.continuous {str(asked).lower()} contradicts engine {engine}; leave batch.continuous out"
            )
        return self


def _requires_serve(schema: dict[str, Any]) -> None:
    """An editor takes a spec without input for that of an endpoint by its section."""
    schema["required"].append("serve")


class ServeSpec(JobSpec):
    """The spec of an endpoint: that of a job, in which input and output may be missing. Rows come from requests."""

    model_config = ConfigDict(json_schema_extra=_requires_serve)

    input: Annotated[InputSpec, shorthand("path")] = InputSpec(path=Location(""))
    """The rows of a job; an endpoint reads `files` only: the hosts and roots of files that requests may name."""
    output: Annotated[OutputSpec, shorthand("path")] = OutputSpec(path=Location(""))
    """The predictions of a job; an endpoint has none."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a spec file as a nested dict. :raises SpecError: if it is missing, not plain YAML or not a mapping."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(plain_yaml.MOST_BYTES + 1)
        values = plain_yaml.load(plain_yaml.decoded(data))
    except OSError as error:
        raise SpecError(f"spec {path} cannot be read: {error.strerror}") from error
    except plain_yaml.RefusedError as error:
        raise SpecError(f"spec {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"spec {path} is not YAML in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"spec {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SpecError(
            f"spec {path} holds a {type(values).__name__}, not keys; start with `task: embedding`"
        )
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of values with each `dotted.key=value` set; values are read as YAML (`4`, `null`, `[a, b]`), except
    those of TEXTS.

    :raises SpecError: for an override without `=`, one below a value that is not a section, or a value that is not
        plain YAML.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    shorthands = {
        **dict.fromkeys(("model", "method", "engine"), "name"),
        **dict.fromkeys(("input", "output", "train", "eval"), "path"),
    }
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise SpecError(f"--set {override!r} has no value; write --set dotted.key=value")
        node = result
        *parents, leaf = dotted.strip().split(".")
        for name in parents:
            inner = node.get(name, {})
            if isinstance(inner, str) and name in shorthands:
                inner = {shorthands[name]: inner}
            if not isinstance(inner, dict):
                raise SpecError(f"--set {override!r}: {name!r} is {inner!r}, which has no keys below it")
            node[name] = node = dict(inner)
        try:
            node[leaf] = parse_text(text) if dotted.strip() in TEXTS else parse_value(text)
        except plain_yaml.RefusedError as error:
            raise SpecError(f"--set {dotted.strip()}: {error}") from error
    return result


def parse_text(text: str) -> str:
    """Returns a command-line value that is a text: as it is, or as YAML reads it if that is a string in quotes."""
    value = parse_value(text) if text[:1] in ("'", '"') else text
    return value if isinstance(value, str) else text


def parse_value(text: str) -> Any:
    """Reads a command-line value as YAML, or as plain text if it is not YAML.

    :raises RefusedError: see `plain_yaml.load`.
    """
    try:
        return plain_yaml.load(text)
    except plain_yaml.RefusedError:
        raise
    except yaml.YAMLError:
        return text
