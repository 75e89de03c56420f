"""Text for a terminal. Everything that a command shows to a person goes through here, and shows as what it is.

Data, names, paths and errors are text, never markup, and what a terminal would obey instead of showing (escape
sequences, line breaks, marks that turn the direction of text) is shown as Python's repr writes it, such as `\\x1b`.
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
"""A text, or a text with its style."""
SYMBOLS = {
    "✓": "ok", "✗": "x", "→": "->", "·": "|", "–": "-", "×": "x", "…": "...", "━": "-", "╸": "-", "╺": "-", "’": "'",
}  # fmt: skip
"""What stands for hfbatch's own symbols where the terminal's encoding has none of them."""


def visible(text: object) -> str:
    """Text in which every character can be seen: control, format and unassigned ones are written as escapes."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in shown)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def line(*parts: Part) -> Text:
    """One line of text as rich shows it, from texts and texts with a style."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(text), style) for text, style in pairs))


def say(console: Console, *parts: Part, wrap: bool = True) -> None:
    """Prints one line. :param wrap: break it at the console's width; False leaves that to the terminal."""
    console.print(line(*parts), soft_wrap=not wrap)


def tell(console: Console, mark: str, style: str, message: str) -> None:
    """Prints a message behind a mark. Its second and further lines are indented: none passes for another message."""
    first, *more = message.splitlines() or [""]
    say(console, (mark, style), " ", first)
    for text in more:
        say(console, "    ", text)


def show(console: Console, renderable: RenderableType) -> None:
    """Prints a table that was made here, or a piece of code."""
    console.print(renderable)


def table(*headings: str, **options: Any) -> Table:
    """A table with headings. :param options: of rich's Table."""
    made = Table(**options)
    for heading in headings:
        made.add_column(line(heading), overflow="fold")
    return made


def facts() -> Table:
    """A table of two columns without headings: name and value."""
    made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    return made


def add(to: Table, *cells: Part | RenderableType) -> None:
    """Adds a row of texts, texts with a style, or pieces that were made here."""
    to.add_row(*(line(cell) if isinstance(cell, str | tuple) else cell for cell in cells))


def screen(err: bool = False) -> Console:
    """Where people read: stdout, or stderr."""
    return Console(stderr=err, markup=False, emoji=False, highlight=False)


def prepare_streams(streams: Iterable[Any] | None = None) -> None:
    """Makes stdout and stderr write any text, whatever their encoding: own symbols in ASCII, others as escapes.

    Without that, a terminal that is not UTF-8, or a file name that is not, ends a command with UnicodeEncodeError.
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
