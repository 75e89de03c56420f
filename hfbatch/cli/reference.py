"""The reference of a spec as Markdown: every field with its type, default and description, from its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hfbatch.spec.schema import json_schema

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def spec_reference(kind: str) -> str:
    """A table of the top-level fields, then one for each section. :param kind: `job` or `finetune`."""
    schema = json_schema(kind)
    definitions = schema["$defs"]
    parts = ["## Fields", "", *_table(schema, definitions)]
    for path, text, section in _sections(schema, definitions, "", {}):
        parts += ["", f"## `{path}`", "", text, *(["", *_table(section, definitions)] if section else [])]
    return "\n".join(parts) + "\n"


def _sections(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str, seen: dict[str, str]
) -> Iterator[tuple[str, str, Mapping[str, Any] | None]]:
    """Dotted name, description and schema of each section; no schema where another section has the same fields."""
    for name, field in schema["properties"].items():
        references = _references(field)
        for reference in references:
            path, section = f"{prefix}{name}", definitions[reference]
            if reference in seen:
                if seen[reference] != path:  # a section of several kinds of one section is of them all
                    yield path, f"Has the same fields as `{seen[reference]}`.", None
                continue
            seen[reference] = path
            kind = f": {section['properties']['name']['const']}" if len(references) > 1 else ""
            yield f"{path}{kind}", section["description"], section
            yield from _sections(section, definitions, f"{path}.", seen)


def _references(field: Mapping[str, Any]) -> list[str]:
    """Names of the sections that a field may hold: several, if the section has kinds with names."""
    found = [one["$ref"] for one in [field, *field.get("anyOf", [])] if "$ref" in one]
    return [reference.rpartition("/")[2] for reference in found]


def _table(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[str]:
    required = schema.get("required", [])
    rows = [
        f"| `{name}` | {type_of(field)} | {_default(field, name in required)} | {_description(field, definitions)} |"
        for name, field in schema["properties"].items()
    ]
    return ["| field | type | default | description |", "|---|---|---|---|", *rows]


def type_of(field: Mapping[str, Any]) -> str:
    """The type of a field in words, such as ``integer ≥ 1 or `auto` ``."""
    match field:
        case {"$ref": str()}:
            return "section"
        case {"anyOf": [*kinds]}:
            return " or ".join(dict.fromkeys(map(type_of, kinds)))
        case {"const": value}:
            return f"`{value}`"
        case {"enum": [*values]}:
            return ", ".join(f"`{value}`" for value in values)
        case {"type": "array", "items": Mapping() as items} if items:
            return f"list of {type_of(items)}"
        case {"type": "array"}:
            return "list"
        case {"type": "object"}:
            return "mapping"
        case {"type": kind}:
            bounds = [f"{sign} {field[key]:,}" for key, sign in BOUNDS.items() if key in field]
            return " ".join([kind, " and ".join(bounds)]).strip()
    return "any"


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = field["default"]
    references = _references(field)
    if references and value is not None:
        return f"`{value['name']}`" if len(references) > 1 else ""
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _description(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """One line: the description of a field, or that of its section where pydantic found both to be equal."""
    described = field if "description" in field else definitions[_references(field)[0]]
    return " ".join(described["description"].split()).replace("|", "\\|")
