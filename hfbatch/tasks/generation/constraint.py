"""Constraints on generated texts, and their grammars: a JSON Schema, a regular expression or a list of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfbatch.errors import SpecError, one_line
from hfbatch.spec.section import Section

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions
    from transformers import GenerationConfig, PreTrainedTokenizerBase

MOST_BYTES = 1 << 16
"""Maximum size of a constraint."""
MOST_DEPTH = 32
"""Maximum depth of a schema, as JSON."""
STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line: with free whitespace, small models write lines without an end."""
COMBINED = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
CONTRADICTING = (
    *("num_beams", "stop_strings", "min_new_tokens", "no_repeat_ngram_size", "bad_words_ids"),
    *("sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    "forced_eos_token_id",
)
"""Options that forbid or force tokens whatever the constraint says, or move texts between rows."""


def _as_text(schema: Any) -> Any:
    """Returns a schema as JSON text, which unlike a mapping keeps the order of properties in a job's identity."""
    try:
        if isinstance(schema, str) and schema.lstrip().startswith("{"):  # the result of an earlier call
            schema = json.loads(schema)
        if not isinstance(schema, Mapping):
            raise ValueError(
                "is no JSON Schema; a spec gives a mapping, or the path of a .json file with one"
            )
        if not all(_fits(value, MOST_DEPTH) for value in schema.values()):
            raise ValueError(f"is deeper than {MOST_DEPTH} levels; put the inner schemas into $defs")
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:  # YAML reads 2026-01-31 as a date
        raise ValueError(f"is not JSON: {error}; put the value in quotes") from error


def _fits(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth > 0 and all(_fits(one, depth - 1) for one in inner)


class ConstraintSpec(Section):
    """What generated texts must be, in one of three forms."""

    json_schema: (
        Annotated[str, BeforeValidator(_as_text, json_schema_input_type=dict[str, Any] | str)] | None
    ) = None
    """A JSON Schema, or the path of a .json file with one; adds the column `parsed`, typed by the schema."""
    regex: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression that the whole text matches: ASCII classes, no look-around and no backreferences."""
    choices: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Texts, of which the model chooses one; adds the column `parsed`."""

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if choices and (
            len({*choices}) < len(choices) or not all(text and text == text.strip() for text in choices)
        ):
            raise ValueError("must differ, and not be empty or begin or end with a space")
        return choices

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("takes exactly one of json_schema, regex and choices")
        if (size := len(str(getattr(self, given[0])).encode())) > MOST_BYTES:
            raise ValueError(f"{given[0]} has {size} bytes, more than {MOST_BYTES}; make it shorter")
        return self

    @property
    def closed_schema(self) -> dict[str, Any]:
        """The JSON Schema, with objects closed; empty for another form."""
        return closed(json.loads(self.json_schema or "{}"))

    @property
    def form(self) -> dict[str, Any]:
        """The constraint by the names of vLLM: `json`, `regex` or `choice`."""
        if self.regex is not None:
            return {"regex": self.regex}
        if self.choices is not None:
            return {"choice": list(self.choices)}
        schema = self.closed_schema
        return {"json": {**schema, "x-guidance": {**STYLE, **schema.get("x-guidance", {})}}}

    def grammar(self) -> str:
        """Returns the grammar of llguidance."""
        from llguidance import LLMatcher, regex_to_lark

        if self.regex is not None:
            # ASCII for \d, \w and \s: few readers take digits of other scripts for numbers.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self.regex, 'dws')}/")
        if self.choices is not None:
            texts = (json.dumps(text, ensure_ascii=False) for text in self.choices)
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        return LLMatcher.grammar_from_json_schema(self.closed_schema, defaults=STYLE)


def closed(schema: Any) -> Any:
    """Returns a schema whose objects have only the properties that it lists, where it does not say otherwise.

    Others would be invented by the model, and have no place in a struct. Schemas in an allOf stay open, since each of
    them lists only a part of the properties.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in {"properties", "$defs", "definitions"} & made.keys():
        if isinstance(made[key], dict):
            made[key] = {name: closed(inner) for name, inner in made[key].items()}
    for key in {"anyOf", "oneOf", "prefixItems"} & made.keys():
        if isinstance(made[key], list):
            made[key] = [closed(inner) for inner in made[key]]
    if "items" in made:
        made["items"] = closed(made["items"])
    if "properties" in made and not {"patternProperties", *COMBINED} & made.keys():
        made.setdefault("additionalProperties", False)
    return made


def with_schema(params: dict[str, Any]) -> dict[str, Any]:
    """Returns params with the content of the schema's file in place of its path: workers and reruns need no file.

    :raises SpecError: if the file cannot be read.
    """
    constraint = params.get("constraint")
    constraint = constraint if isinstance(constraint, dict) else {}
    path = constraint.get("json_schema")
    if not isinstance(path, str) or path.lstrip().startswith("{"):
        return params
    name = f"params.constraint.json_schema: file {path!r}"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        schema = json.loads(data) if len(data) <= MOST_BYTES else None
    except OSError as error:
        raise SpecError(
            f"{name} cannot be read: {error.strerror}; give another path, or the schema"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{name} is not JSON: {one_line(error)}") from error
    if not isinstance(schema, dict):
        raise SpecError(f"{name} is no JSON Schema, which is an object of at most {MOST_BYTES} bytes")
    return {**params, "constraint": {**constraint, "json_schema": schema}}


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> LLTokenizer:
    """Returns a tokenizer for llguidance, which takes a second for a large vocabulary.

    :raises ValueError: for a tokenizer that it does not support.
    """
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=config.eos_token_id)


@dataclass(frozen=True)
class Grammar:
    """A compiled constraint."""

    start: LLMatcher
    """What each text is matched with, at its start."""
    vocabulary: int
    """Number of token ids that it knows."""


def compile_constraint(spec: ConstraintSpec, tokenizer: LLTokenizer) -> Grammar:
    """Compiles a constraint for a tokenizer. :raises ValueError: with the message of llguidance."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, spec.grammar(), log_level=0)
    matcher.compute_bitmask()  # some limits show only here
    if matcher.is_error():
        raise ValueError(one_line(ValueError(matcher.get_error())))
    return Grammar(matcher, tokenizer.vocab_size)


def constraint_faults(
    spec: ConstraintSpec,
    config: GenerationConfig,
    begin_with: str | None,
    tokenizer: Callable[[], LLTokenizer],
    model: str,
) -> list[str]:
    """Returns errors for options that contradict a constraint, and for what llguidance cannot compile.

    :param config: the resolved options of generation.
    :param tokenizer: calls `read_tokenizer`.
    :param model: the model's name.
    """
    if find_spec("llguidance") is None:
        return ["params.constraint needs llguidance; pip install 'hfbatch[constraint]'"]
    faults = list(_contradictions(config, begin_with))
    if config.eos_token_id is None:
        return [*faults, f"params.constraint: model {model!r} has no eos token, with which a text could end"]
    try:
        known = tokenizer()
    except ValueError as error:
        return [
            *faults,
            f"params.constraint: llguidance does not support the tokenizer of model {model!r}: {one_line(error)}; "
            "choose another model, or leave it out",
        ]
    try:
        compile_constraint(spec, known)
    except ValueError as error:
        faults.append(f"params.constraint is refused by llguidance: {error}")
    return faults


def _contradictions(config: GenerationConfig, begin_with: str | None) -> Iterator[str]:
    asked = {name: getattr(config, name) for name in CONTRADICTING}
    asked = {name: value for name, value in asked.items() if value not in (None, 0, 1, False)}
    if begin_with:
        asked["begin_with"] = begin_with
    if asked:
        shown = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        yield (
            f"params.constraint does not work with {shown} (of params or the model's generation_config); "
            "set the option to null, 1 or 0, or leave the constraint out"
        )
