"""Paths and URLs, whose text tells no secrets. Opens none of them."""

from __future__ import annotations

from typing import Any, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from hfbatch.errors import redact

WITH_SECRETS = {"secrets": True}
"""Context of a `model_dump` that is to hold the secrets of URLs: what goes to workers and nowhere else."""


class Location(str):
    """A path or URL. Its text is without the secrets of a URL, whichever way it becomes text.

    :param path: a path or URL in full, or a Location.
    """

    unmasked: str
    """The URL in full, to open it with."""

    def __new__(cls, path: str) -> Self:
        """Keeps the path, and shows it without secrets."""
        full = path.unmasked if isinstance(path, Location) else path
        self = super().__new__(cls, redact(full))
        self.unmasked = full
        return self

    def __getnewargs__(self) -> tuple[str]:
        """Copies and pickles keep the secrets."""
        return (self.unmasked,)

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """A text in specs; as JSON it has its secrets only in the context WITH_SECRETS."""
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if isinstance(value, cls) else cls(read(value)),
            core_schema.str_schema(min_length=1),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: cls(value).unmasked if info.context == WITH_SECRETS else str(cls(value)),
                info_arg=True,
                when_used="json",
            ),
        )
