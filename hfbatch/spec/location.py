"""Paths and URLs that are shown without their secrets. Opens none of them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from hfbatch.errors import redact

WITH_SECRETS = {"secrets": True}
"""Context of a `model_dump` that includes the secrets of URLs; only for data that is sent to workers."""


class Location(str):
    """A path or URL. Its string value is without the secrets of a URL.

    :param path: a full path or URL, or a Location.
    """

    unmasked: str
    """The full URL, to open it."""

    def __new__(cls, path: str) -> Self:
        """Stores the full path; the string value is redacted."""
        full = path.unmasked if isinstance(path, Location) else path
        self = super().__new__(cls, redact(full))
        self.unmasked = full
        return self

    def __getnewargs__(self) -> tuple[str]:
        """Copies and pickles keep the secrets."""
        return (self.unmasked,)

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Returns the schema of a string; its JSON includes secrets only in the context WITH_SECRETS."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if isinstance(value, cls) else cls(read(value)),
            core_schema.str_schema(min_length=1),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: cls(value).unmasked if info.context == WITH_SECRETS else str(cls(value)),
                info_arg=True,
                when_used="json",
            ),
        )
