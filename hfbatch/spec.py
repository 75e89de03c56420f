"""The spec: what the user writes, as YAML, flags or Python. Checks form, touches no file but the spec itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from hfbatch import plain_yaml
from hfbatch.errors import SpecError

Auto = Literal["auto"]


class Section(BaseModel):
    """A frozen part of the spec that refuses unknown keys and takes field docs from docstrings."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """A key with nothing behind it, such as `params:`, is one left out, unless null is a value of its own there."""
        if not isinstance(values, dict):
            return values
        never_null = {
            name
            for name, field in cls.model_fields.items()
            if not field.is_required() and type(None) not in get_args(field.annotation)
        }
        return {key: value for key, value in values.items() if value is not None or key not in never_null}


def shorthand(key: str) -> BeforeValidator:
    """A plain string stands for a section with one key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class ModelSpec(Section):
    """Which model, at which revision and precision."""

    name: str = Field(min_length=1)
    """A Hub name (org/model) or a folder with config.json and safetensors weights."""
    revision: str | None = None
    """A branch, tag or commit of the Hub; pinned to a commit before work starts."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations; auto is the best that the device runs natively."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code first."""


class InputSpec(Section):
    """Where the rows are."""

    path: str = Field(min_length=1)
    """A folder, file or glob: a local path, s3://, gs://, hf:// or another fsspec URL."""
    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    """File format; auto goes by the file names' endings."""
    columns: dict[str, str] = {}
    """Task input to dataset column, where the names differ, such as {text: body}."""
    filter: str | None = None
    """A SQL condition; rows for which it is not true are left out, such as "lang = 'en'"."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first N rows of the input (counted before the filter)."""
    split_rows: int | None = Field(default=None, ge=1)
    """Most rows in a split, the unit of work and of commit; the default depends on the task."""


class OutputSpec(Section):
    """Where the predictions go."""

    path: str = Field(min_length=1)
    """The output folder: one Parquet part for each split."""
    keep: tuple[str, ...] | None = None
    """Input columns to copy beside the predictions; default: all of them."""
    prefix: str = ""
    """Put before the name of every output column of the task."""
    truncated: bool | str = False
    """Add a column of booleans, which rows were truncated; true names it `truncated`, a text is its name."""

    @property
    def truncated_column(self) -> str | None:
        """Name of the column that says which rows were truncated; None where nobody asked for it."""
        return "truncated" if self.truncated is True else self.truncated or None


Side = Literal["left", "right"] | None
SpecialToken = Literal[
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
]


class TokenizerSpec(Section):
    """Changes to the model's tokenizer. New tokens get new embeddings, which no training has touched."""

    add_tokens: tuple[str, ...] = ()
    """Words that become one token each, such as [covid, mRNA]."""
    add_special_tokens: tuple[str, ...] = ()
    """Tokens to add that are never split or put into lower case, such as ["<row>"]."""
    special_tokens: dict[SpecialToken, str] = {}
    """Which token has which part, such as {pad_token: "<pad>"}; added where the vocabulary lacks it."""
    truncation_side: Side = None
    """The end of a long row that is cut off; null leaves it to the task and the tokenizer's files."""
    padding_side: Side = None
    """Where a model that pads every row to a fixed length gets its padding; null: as for truncation."""


class BatchSpec(Section):
    """What the device gets at once."""

    size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Rows in a batch; auto tries a few sizes on real rows and keeps the fastest that fits."""
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of a row; longer ones are truncated and counted. Default: the model's own limit."""
    tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a batch with its padding, which cuts batches along with size. Default: where size is auto,
    4096 for texts that a CPU reads whole; no bound elsewhere."""
    continuous: bool = False
    """Text generation: a finished row makes room for the next; size is then rows at once, tokens those of a step."""


class WorkersSpec(Section):
    """How many model workers, and what each of them takes."""

    count: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Workers that hold the model; auto fills the cluster."""
    gpus: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs of one worker; auto is 1 where the cluster has GPUs, else 0."""
    cpus: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs of one worker."""


class RejectsSpec(Section):
    """How many rows may fail."""

    max_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest share of rejected rows with which a job still succeeds."""


class Spec(Section):
    """A whole spec: read from YAML, validated with every fault, written as YAML."""

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

    def to_yaml(self) -> str:
        """The spec as YAML, without the fields that have their default value."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        )


class JobSpec(Spec):
    """One batch job, whole."""

    task: str = Field(min_length=1)
    """What to do with each row; `hfbatch tasks` lists the choices, auto goes by the model's files."""
    model: Annotated[ModelSpec, shorthand("name")]
    """The model; a plain string is its name."""
    input: Annotated[InputSpec, shorthand("path")]
    """The rows; a plain string is the path."""
    output: Annotated[OutputSpec, shorthand("path")]
    """The predictions; a plain string is the path."""
    tokenizer: TokenizerSpec = TokenizerSpec()
    """Changes to the model's tokenizer."""
    batch: BatchSpec = BatchSpec()
    """How rows are batched."""
    workers: WorkersSpec = WorkersSpec()
    """How the work is spread."""
    params: dict[str, Any] = {}
    """Options of the task; `hfbatch tasks NAME` lists them."""
    rejects: RejectsSpec = RejectsSpec()
    """How many rows may fail."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A spec file as a nested dict. :raises SpecError: when it is absent, not plain YAML or not a mapping."""
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
    """A copy of values with each `dotted.key=value` set; the value is read as YAML (`4`, `null`, `[a, b]`).

    :raises SpecError: for an override without `=`, one below a value that is not a section, or a value that is no
        plain YAML.
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    shorthands = {
        "model": "name",
        "method": "name",
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
            node[leaf] = parse_value(text)
        except plain_yaml.RefusedError as error:
            raise SpecError(f"--set {dotted.strip()}: {error}") from error
    return result


OF_SEVERAL = re.compile(r"literal\[.*\]|constrained-\w+|float|int|str|bool")
"""What pydantic adds to the name of a field that may have several types: the one that does not fit."""


def parse_value(text: str) -> Any:
    """A command-line value read as YAML, or as the plain text where it is not YAML.

    :raises RefusedError: see `plain_yaml.load`.
    """
    try:
        return plain_yaml.load(text)
    except plain_yaml.RefusedError:
        raise
    except yaml.YAMLError:
        return text


def faults_of(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """One sentence for each fault of a pydantic error; an unknown key gets the list of those that exist.

    A section's own check raises a ValueError with one argument for each fields that do not go together.
    """
    together: list[str] = []
    found: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for fault in error.errors(include_url=False):
        if fault["type"] == "value_error" and not fault["loc"]:
            together += fault["ctx"]["error"].args
            continue
        place, told = fault["loc"], fault["msg"].removeprefix("Input should be ")
        if place and fault["type"] != "extra_forbidden" and OF_SEVERAL.fullmatch(str(place[-1])):
            place = place[:-1]
        if place in found:
            found[place]["msg"] += f", or {told}"
        else:
            found[place] = {**fault, "loc": place}
    return [_sentence(fault, model, where) for fault in found.values()] + together


def _sentence(fault: Any, model: type[BaseModel], where: str) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join([where, *path] if where else path)
    match fault["type"]:
        case "extra_forbidden":
            known = _fields_at(model, path[:-1])
            near = [name.removesuffix(path[-1]) + key for key in get_close_matches(path[-1], known, 1)]
            meant = near or _elsewhere(path[-1], model)
            alike = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
            return f"unknown key {name!r} (known here: {', '.join(known)}){alike}"
        case "missing":
            return f"{name} is missing; add it to the spec"
        case _:
            return f"{name}: {fault['msg']} (got {fault['input']!r})"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        section = _section(model, part)
        if section is None:
            break
        model = section
    return list(model.model_fields)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a field, if it is a section."""
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _elsewhere(key: str, model: type[BaseModel]) -> list[str]:
    """Full names of a key that stands in the wrong place, wherever the spec has it."""
    sections = {name: _section(model, name) for name in model.model_fields}
    found = [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]
    return [key] * (key in model.model_fields) + found
