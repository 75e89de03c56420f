"""Loads YAML as plain values: strings, integers, finite numbers, booleans, null, lists and mappings, within limits.

YAML allows more than a spec needs: aliases that expand to a billion values, lists that contain themselves, duplicate
keys, tags that create objects. Each of these is refused with a message.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Maximum values of a document; those of an alias count wherever it is used."""
MOST_LEVELS = 50
PLAIN = ("str", "int", "float", "bool", "null", "seq", "map", "merge")
"""The tags of YAML that are supported."""


class RefusedError(yaml.YAMLError):
    """Raised for well-formed YAML with unsupported content."""


def load(text: str) -> Any:
    """Loads one document.

    :raises RefusedError: if it is too large or too deep, or contains itself, duplicate keys, NaN or infinity.
    :raises yaml.YAMLError: if it is not YAML, or has tags other than those of plain values.
    """
    if len(text) > MOST_BYTES:
        raise RefusedError(f"it is larger than {MOST_BYTES:,} characters")
    _check_size(text)
    return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader with fewer tags


def decoded(data: bytes) -> str:
    """Decodes data as UTF-8. :raises RefusedError: if it is too large. :raises UnicodeDecodeError: if it is not UTF-8."""
    if len(data) > MOST_BYTES:
        raise RefusedError(f"it is larger than {MOST_BYTES:,} bytes")
    return data.decode("utf8")


def _check_size(text: str) -> None:
    """Counts values before any is created. Uses a stack, not recursion, since a document may be deep."""
    sizes: dict[str, int | None] = {}  # by anchor; None while it is open
    stack: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, yaml.SafeLoader):
        made = 0
        match event:
            case yaml.CollectionStartEvent():
                stack.append((event.anchor, 1))
                if len(stack) > MOST_LEVELS:
                    raise RefusedError(f"it is nested deeper than {MOST_LEVELS} levels{_at(event)}")
                if event.anchor:
                    sizes[event.anchor] = None
            case yaml.CollectionEndEvent():
                anchor, made = stack.pop()
                if anchor:
                    sizes[anchor] = made
            case yaml.ScalarEvent():
                made = 1
                if event.anchor:
                    sizes[event.anchor] = 1
            case yaml.AliasEvent():
                size = sizes.get(str(event.anchor), 1)
                if size is None:
                    raise RefusedError(
                        f"*{event.anchor} is used inside of the value that it names{_at(event)}"
                    )
                made = size
        anchor, before = stack[-1]
        stack[-1] = anchor, before + made
        if before + made > MOST_VALUES:
            raise RefusedError(
                f"it holds more than {MOST_VALUES:,} values, those of its aliases counted{_at(event)}"
            )


def _at(event: Any) -> str:
    return f" (line {event.start_mark.line + 1})"


class _Loader(yaml.SafeLoader):
    """Creates only plain values. Dates stay strings: no spec field is a date, and a branch may be named 2026-01-01."""

    yaml_constructors = {
        f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
        for kind in PLAIN
        if kind != "merge"
    } | {None: yaml.SafeLoader.yaml_constructors[None]}

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Composes a mapping; refuses duplicate keys."""
        node: Any = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], Any] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                lines = first.start_mark.line + 1, key.start_mark.line + 1
                raise RefusedError(f"key {key.value!r} comes twice, in lines {lines[0]} and {lines[1]}")
        return node

    def construct_yaml_float(self, node: Any) -> float:
        """Constructs a finite number."""
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise RefusedError(f"{node.value} is not a finite number{_at(node)}")
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
