"""`hfbatch preview`: a few rows beside what they give, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hfbatch.console.display import add, facts, say, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from hfbatch.predict.preview import Preview

MOST_CHARACTERS = 200
MOST_NUMBERS = 4


def to_values(preview: Preview) -> dict[str, Any]:
    """The preview as plain values; bytes become a text that says how many there are."""
    values = {name: value for name, value in asdict(preview).items() if name != "spec"}
    made = {"task": preview.spec.task, **values}
    return json.loads(json.dumps(made, default=_plain))


def render(preview: Preview, console: Console) -> None:
    """Shows inputs beside outputs, rejects with their tracebacks, and the seconds of each step."""
    shown = table("row", "input", "output", box=None, padding=(0, 2, 1, 0))
    for one in preview.rows:
        add(shown, f"{one['file']}:{one['row']}", _cell(one["input"]), _cell(one["output"]))
    if preview.rows:
        show(console, shown)
    for one in preview.rejects:
        say(
            console,
            ("rejected ", "red"),
            f"{one['file']}:{one['row']} in {one['stage']}: {one['error']}: {one['message']}",
        )
        say(console, ("  input: " + _cell(one["input"]), "dim"))
        for line in one["traceback"].splitlines():
            say(console, ("  " + line, "dim"), wrap=False)
    about = facts()
    add(about, "task", f"{preview.spec.task} with {preview.model}")
    add(about, "engine", preview.engine)
    if preview.guard:
        add(about, "precision", preview.guard["summary"])
    add(about, "seconds", ", ".join(f"{name} {value:.1f}" for name, value in preview.seconds.items()))
    for note in preview.notes:
        add(about, "note", note)
    show(console, about)


def _cell(values: dict[str, Any]) -> str:
    if len(values) == 1:
        return _short(next(iter(values.values())))
    return "; ".join(f"{name}: {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    """A value on a line or two: long texts and lists are cut, and say how long they are."""
    if isinstance(value, bytes):
        return _plain(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        items = ", ".join(_short(item) for item in value[:MOST_NUMBERS])
        return f"[{items}, … {len(value)} items]" if len(value) > MOST_NUMBERS else f"[{items}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text):,} characters)"


def _plain(value: Any) -> str:
    return f"{len(value):,} bytes" if isinstance(value, bytes) else str(value)
