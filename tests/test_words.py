"""Texts that people read use the field's words: `words.yaml` lists what to write instead of private ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.layers import MODULES, ROOT

TOP = Path(__file__).parent.parent
WORDS = yaml.safe_load((TOP / "tests/words.yaml").read_text(encoding="utf8"))
TEXTS = [
    TOP / "README.md",
    *sorted(ROOT.rglob("*.j2")),
    *sorted(ROOT.rglob("*.md")),
    *sorted((TOP / "jobs").iterdir()),
]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of what a person may read in a file: strings and docstrings of Python, else the whole of it."""
    source = path.read_text(encoding="utf8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from enumerate(node.value.splitlines(), node.lineno)


def uses_of(path: Path) -> list[str]:
    """The listed words that a file uses, with their places."""
    return [
        f"{path.name}:{line}: {found.group()!r} in {text.strip()!r}; write: {instead}"
        for line, text in texts_of(path)
        for word, instead in WORDS.items()
        for found in re.finditer(word, text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", [*(ROOT / module for module in MODULES), *TEXTS], ids=lambda path: path.name)
def test_texts_use_the_fields_words(path: Path) -> None:
    assert uses_of(path) == []


def test_a_listed_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('def f():\n    """Tells what it\n    learns."""\n')
    assert [use.partition(": ")[0] for use in uses_of(tmp_path / "a.py")] == ["a.py:2", "a.py:3"]
