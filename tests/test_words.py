"""Texts and names in the code use the field's words: `words.yaml` lists what to write instead of private ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from tests.layers import MODULES, ROOT

TOP = Path(__file__).parent.parent
WORDS, OF_NAMES = yaml.safe_load_all((TOP / "tests/words.yaml").read_text(encoding="utf8"))
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


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of what a module defines: itself, its functions, classes, arguments and fields."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield node.lineno, name


def words_in(name: str) -> list[str]:
    """The words of a name in snake_case, CamelCase or CAPITALS, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def private_names_of(path: Path) -> list[str]:
    """The names in a module that contain a listed word, with their places."""
    return [
        f"{path.name}:{line}: {name}; write: {instead}"
        for line, name in names_of(path)
        for instead in {better for word in words_in(name) for better in instead_of(word)}
    ]


@cache
def instead_of(word: str) -> list[str]:
    """What to write in place of a word in names; nothing where it is not listed."""
    return [instead for words, instead in OF_NAMES.items() if re.fullmatch(words, word)]


def test_texts_use_the_fields_words() -> None:
    assert [
        found for path in (*(ROOT / module for module in MODULES), *TEXTS) for found in uses_of(path)
    ] == []


def test_names_use_the_fields_words() -> None:
    assert [found for module in MODULES for found in private_names_of(ROOT / module)] == []


def test_a_listed_word_is_found_in_a_name(tmp_path: Path) -> None:
    (tmp_path / "sounds.py").write_text("class Told:\n    def f(self, PICTURES_by_name, tellers): ...\n")
    found = [use.partition("; ")[0] for use in private_names_of(tmp_path / "sounds.py")]
    assert found == ["sounds.py:1: sounds", "sounds.py:1: Told", "sounds.py:2: PICTURES_by_name"]


def test_a_listed_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('def f():\n    """Tells what it\n    learns."""\n')
    assert [use.partition(": ")[0] for use in uses_of(tmp_path / "a.py")] == ["a.py:2", "a.py:3"]
