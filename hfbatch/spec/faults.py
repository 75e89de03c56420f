"""Converts the errors of pydantic to sentences that name the key, its value and the keys that exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

OF_SEVERAL = re.compile(r"literal\[.*\]|constrained-\w+|float|int|str|bool")
"""Type that pydantic appends to the location of an error in a field of several types."""


def faults_of(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """Returns one sentence for each fault of a pydantic error; for an unknown key, with the list of known ones.

    Sections raise a ValueError with one argument for each inconsistency of their fields.
    """
    together: list[str] = []
    found: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for fault in error.errors(include_url=False):
        if fault["type"] == "value_error" and not fault["loc"]:
            together += fault["ctx"]["error"].args
            continue
        place, expected = fault["loc"], fault["msg"].removeprefix("Input should be ")
        if place and fault["type"] != "extra_forbidden" and OF_SEVERAL.fullmatch(str(place[-1])):
            place = place[:-1]
        if place in found:
            found[place]["msg"] += f", or {expected}"
        else:
            found[place] = {**fault, "loc": place}
    return [_sentence(fault, model, where) for fault in found.values()] + together


def _sentence(fault: Any, model: type[BaseModel], where: str) -> str:
    path = _without_tags(map(str, fault["loc"]), model)
    name = ".".join([where, *path] if where else path)
    match fault["type"]:
        case "union_tag_invalid":
            return f"{name}.name: {fault['ctx']['tag']!r} is none of: {fault['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return f"{name}.name is missing; add it to the spec"
        case "extra_forbidden":
            known = _fields_at(model, [*map(str, fault["loc"][:-1])])
            near = [name.removesuffix(path[-1]) + key for key in get_close_matches(path[-1], known, 1)]
            meant = near or _elsewhere(path[-1], model)
            alike = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
            return f"unknown key {name!r} (known here: {', '.join(known)}){alike}"
        case "missing":
            return f"{name} is missing; add it to the spec"
        case "string_unicode":
            return f"{name}: {fault['input']!r} is not UTF-8; rename it"
        case _:
            said = fault["msg"].removeprefix("Value error, ")
            return f"{name}: {said} (got {fault['input']!r})"


def _without_tags(loc: Iterable[str], model: type[BaseModel]) -> list[str]:
    """Returns the location of a fault as a spec has it; pydantic adds the name of a section such as `engine`."""
    path: list[str] = []
    for part in loc:
        if not (path and part in _kinds_of(model, path[-1])):
            path.append(part)
    return path


def _fields_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Returns the keys of a section. :param loc: its place as pydantic gives it, with the names of kinds."""
    kinds: Mapping[str, type[BaseModel]] = {}
    for part in loc:
        section = kinds.get(part) or _section(model, part)
        kinds = {} if part in kinds else _kinds_of(model, part)
        if section is None and not kinds:
            break
        model = section or model
    return list(model.model_fields)


def _kinds_of(model: type[BaseModel], name: str) -> dict[str, type[BaseModel]]:
    """Returns the kinds of a section that has several, by their `name`; empty for other fields."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    kinds = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if len(kinds) < 2:
        return {}
    return {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in kinds}


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Returns the model of a field, if it is a section."""
    kind = model.model_fields[name].annotation if name in model.model_fields else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _elsewhere(key: str, model: type[BaseModel]) -> list[str]:
    """Returns the full names of a misplaced key, for all places where the spec has it."""
    sections = {name: _section(model, name) for name in model.model_fields}
    found = [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]
    return [key] * (key in model.model_fields) + found
