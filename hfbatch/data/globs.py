"""Matches globs over relative paths folder by folder, so that a listing enters only folders that can match."""

from __future__ import annotations

import re

from fsspec.utils import glob_translate

from hfbatch.errors import SpecError

MARKS = "*?["
State = frozenset[int]
"""Numbers of pattern parts that a path may have matched; empty if nothing at or below it can match."""


class Glob:
    """A pattern in which `**` matches any number of folders, and `*`, `?` and `[...]` match within one name.

    It also matches a file if it matches a folder that contains the file. "" matches every file.

    :raises SpecError: for an invalid pattern.
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
        """Returns the state below a folder, or at a file, with that name."""
        found = set()
        for used in state:
            if used == len(self._parts):
                return state
            part = self._parts[used]
            if part is None:
                # A final `**` matches at least one name.
                found |= {used, used + 1} if used + 1 == len(self._parts) else {used}
            elif part.match(name):
                found.add(used + 1)
        return self._closed(found)

    def walk(self, path: str) -> State:
        """Returns the state at a relative path."""
        state = self.start
        for name in filter(None, path.split("/")):
            state = self.step(state, name)
        return state

    def accepts(self, state: State) -> bool:
        """Returns whether a file in that state matches."""
        return len(self._parts) in state

    def _closed(self, state: set[int]) -> State:
        """Adds the states after each `**`, which may match no folder; returns only the final state if it is reached."""
        last = len(self._parts) - 1
        for used in sorted(state):
            while used < last and self._parts[used] is None:
                used += 1
                state.add(used)
        return frozenset({last + 1}) if last + 1 in state else frozenset(state)
