"""The base class of a spec's sections."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

Auto = Literal["auto"]


class Section(BaseModel):
    """Base class of the spec's sections: frozen, refuses unknown keys, takes field descriptions from docstrings."""

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
        """Drops keys without a value, such as `params:`, unless the field accepts null."""
        if not isinstance(values, dict):
            return values
        never_null = {
            name
            for name, field in cls.model_fields.items()
            if not field.is_required() and type(None) not in get_args(field.annotation)
        }
        return {key: value for key, value in values.items() if value is not None or key not in never_null}
