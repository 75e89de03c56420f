"""Sections of a spec that a plain string may stand for, such as `model: org/model`."""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema


class _Shorthand:
    """Annotation of a section that a plain string may stand for.

    :param key: the field of the section that the string is the value of.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._expanded, handler(source))

    def __get_pydantic_json_schema__(
        self, section: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        shown = handler(section)
        kinds = shown.get("oneOf") or shown.get("anyOf") or [shown]
        fields = [
            handler.resolve_ref_schema(kind)["properties"][self._key] for kind in kinds if "$ref" in kind
        ]
        plain = {key: fields[0][key] for key in ("type", "enum", "minLength") if key in fields[0]}
        if "const" in fields[0]:
            plain["enum"] = [field["const"] for field in fields]
        return {"anyOf": [plain, *kinds]}

    def _expanded(self, value: Any) -> Any:
        return {self._key: value} if isinstance(value, str) else value


def shorthand(key: str) -> Any:
    """A plain string stands for a section with one key."""
    return _Shorthand(key)
