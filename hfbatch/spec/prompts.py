"""Params with which a spec renders a task's input from the columns of each row. `data.templates` compiles them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hfbatch.spec.section import Section


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
