"""Params with which a spec renders a task's input from the columns of each row. `data.templates` compiles them."""

from __future__ import annotations

from types import new_class
from typing import Annotated, TypeVar, cast

from pydantic import ConfigDict, Field

from hfbatch.spec.section import Section

S = TypeVar("S", bound=Section)


class TemplateParams(Section):
    """The param of tasks that read a text."""

    template: str | None = None
    """Jinja template of the text over the columns of the row, such as "Summarise: {{ body }}"; see `hfbatch docs data`."""


class PartTemplate(Section):
    """A part of a message: a text, or the position of the row's next image or recording."""

    type: str
    """text, or an input with media, such as image."""
    text: str = ""
    """The template of a text."""


class MessageTemplate(Section):
    """A message of a chat."""

    role: str
    """Such as system or user."""
    content: str | Annotated[tuple[PartTemplate, ...], Field(min_length=1)]
    """The template of its text, or parts."""


class MessagesParams(Section):
    """The param of tasks that read chats."""

    messages: Annotated[tuple[MessageTemplate, ...], Field(min_length=1)] | None = None
    """The chat of each row: messages such as {role: user, content: "{{ body }}"}, each content a template as in `template`."""


RENDERING: dict[str, type[Section]] = {"template": TemplateParams, "messages": MessagesParams}
"""The params that render an input, and the sections that have them."""


def with_rendering(params: type[S], names: set[str]) -> type[S]:
    """Returns a task's params and those that render its inputs, as one section."""
    more = [kind for name, kind in RENDERING.items() if name in names and not issubclass(params, kind)]
    if not more:
        return params
    # All fields have their descriptions, which pydantic would look for in every frame of the stack.
    known_as = {key: getattr(params, key) for key in ("__doc__", "__module__", "__qualname__")}
    body = {"model_config": ConfigDict(use_attribute_docstrings=False)} | known_as
    united = cast(
        "type[S]", new_class(params.__name__, (params, *more), exec_body=lambda own: own.update(body))
    )
    united.model_config["use_attribute_docstrings"] = True  # of sections that are derived from it
    return united
