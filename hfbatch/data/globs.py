"""Globs over relative paths, taken folder by folder, so that a listing enters only where a match can be."""

from __future__ import annotations

import re

from fsspec.utils import glob_translate

from hfbatch.errors import SpecError

MARKS = "*?["
State = frozenset[int]
"""How many parts of a pattern a path may have used up; empty where no match can be at or below it."""


class Glob:
    """A pattern in which `**` is any number of folders, `*`, `?` and `[...]` stay in one name.

    It matches a file also where it matches a folder that the file lies in. "" matches every file.

    :raises SpecError: for a pattern that means nothing.
    """

    def __init__(self, pattern: str = "") -> None:
        self._parts: list[re.Pattern[str] | None] = []
        for part in filter(None, pattern.split("/")):
            try:
                self._parts.append(None if part == "**" else re.compile(glob_translate(part)))
            except (ValueError, re.error) as error:
                raise SpecError(f"{part!r} in the glob {pattern!r} is no pattern: {error}") from error
        self.start = self._closed({0})

    def step(self, state: State, name: str) -> State:
        """The state below a folder, or at a file, of that name."""
        found = set()
        for used in state:
            if used == len(self._parts):
                return state
            part = self._parts[used]
            if part is None:
                # At the end it stands for one name at least.
                found |= {used, used + 1} if used + 1 == len(self._parts) else {used}
            elif part.match(name):
                found.add(used + 1)
        return self._closed(found)

    def walk(self, path: str) -> State:
        """The state at a relative path."""
        state = self.start
        for name in filter(None, path.split("/")):
            state = self.step(state, name)
        return state

    def accepts(self, state: State) -> bool:
        """Whether a file in that state matches."""
        return len(self._parts) in state

    def _closed(self, state: set[int]) -> State:
        """With the states behind each `**`, which may stand for no folder; where all is used up, that state alone."""
        last = len(self._parts) - 1
        for used in sorted(state):
            while used < last and self._parts[used] is None:
                used += 1
                state.add(used)
        return frozenset({last + 1}) if last + 1 in state else frozenset(state)
