"""Terminal output. Every text that a command prints for a person goes through this module, and is escaped.

Data, names, paths and errors are text, never markup. Control characters that a terminal would interpret (escape
sequences, line breaks, marks that change the direction of text) are written as in Python's repr, such as `\\x1b`.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

Part = str | tuple[str, str]
"""A text, or a pair of text and style."""
SYMBOLS = {
    "✓": "ok", "✗": "x", "→": "->", "·": "|", "–": "-", "×": "x", "…": "...", "━": "-", "╸": "-", "╺": "-", "’": "'",
}  # fmt: skip
"""Replacements of hfbatch's own symbols for terminals whose encoding lacks them."""


def visible(text: object) -> str:
    """Escapes control, format and unassigned characters, so that every character of the result is visible."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in shown)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def line(*parts: Part) -> Text:
    """Joins texts, with or without a style, to one line for rich."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(text), style) for text, style in pairs))


def say(console: Console, *parts: Part, wrap: bool = True) -> None:
    """Prints one line. :param wrap: whether to break it at the console's width; False leaves that to the terminal."""
    console.print(line(*parts), soft_wrap=not wrap)


def say_marked(console: Console, mark: str, style: str, message: str) -> None:
    """Prints a message after a mark. Its further lines are indented, so that they do not look like other messages."""
    first, *more = message.splitlines() or [""]
    say(console, (mark, style), " ", first)
    for text in more:
        say(console, "    ", text)


def show(console: Console, renderable: RenderableType) -> None:
    """Prints a table made by this module, or a piece of code."""
    console.print(renderable)


def markdown(console: Console, text: str) -> None:
    """Prints Markdown of the package itself: formatted on a terminal, else as it is written."""
    if not console.is_terminal:
        for one in text.splitlines():
            say(console, one, wrap=False)
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))


def table(*headings: str, **options: Any) -> Table:
    """Creates a table with headings. :param options: options of rich's Table."""
    made = Table(**options)
    for heading in headings:
        made.add_column(line(heading), overflow="fold")
    return made


def facts() -> Table:
    """Creates a table of two columns without headings: name and value."""
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold", min_width=1)  # rich leaves out a column of combining characters alone
    return made


def add(to: Table, *cells: Part | RenderableType) -> None:
    """Adds a row of texts, texts with a style, or renderables made by this module."""
    to.add_row(*(line(cell) if isinstance(cell, str | tuple) else cell for cell in cells))


def screen(err: bool = False) -> Console:
    """Creates a console on stdout, or on stderr."""
    return Console(stderr=err, markup=False, emoji=False, highlight=False)


def prepare_streams(streams: Iterable[Any] | None = None) -> None:
    """Lets stdout and stderr write any text in any encoding: hfbatch's symbols as ASCII, other characters as escapes.

    Without it, a terminal or a file name that is not UTF-8 would end a command with UnicodeEncodeError.
    """
    codecs.register_error("hfbatch", _encodable)
    for stream in (sys.stdout, sys.stderr) if streams is None else streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hfbatch")


def _encodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SYMBOLS.get(c) or _escape(c) for c in text), error.end
